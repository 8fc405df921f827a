/// @file
/// The first pass of a difference: the loss gradient, and of each probe its gradient by what counts and by all
/// parameters.
#pragma once

#include <ATen/core/Tensor.h>
#include <microreg/detail/text.hpp>
#include <microreg/difference.hpp>
#include <microreg/error.hpp>
#include <microreg/gates/tape.hpp>
#include <microreg/gates/unseen.hpp>
#include <microreg/parameters.hpp>
#include <microreg/step/difference_passes.hpp>
#include <microreg/step/gradients.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/own_code.hpp>
#include <microreg/step/probes.hpp>
#include <microreg/step/tensor_lists.hpp>
#include <microreg/step/visitor.hpp>

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// Makes it, for all micro-batches of one step.
class FirstPass {
 public:
  FirstPass(const DifferenceSettings& settings, const Parameters& parameters)
      : settings_(settings), parameters_(parameters) {}

  /// Adds the loss gradient to `sums`, but where a displaced pass will. `penalised`: there will be some.
  void operator()(DifferencePasses& passes, std::vector<at::Tensor>& sums, bool penalised,
                  const Visitor& visitor) const {
    visitor.begin();
    const auto evaluation =
        recorded(passes.gates, settings_.frozen(), [&] { return passes.batch.evaluate(passes.part, {}); });
    require_seen(evaluation->loss, "the loss", {&passes.gates}, penalised);
    passes.inputs = evaluation->inputs;
    std::vector<std::vector<at::Tensor>> probes(passes.terms.size());
    for (std::size_t i = 0; i < passes.terms.size(); ++i) {
      const TermInfo& info = passes.batch.term(i);
      DifferenceTerm& term = passes.terms[i];
      probes[i] =
          recorded(*term.gates, settings_.frozen(), [&] { return checked_probes(*evaluation, i, info, &term.draws); });
      for (const at::Tensor& probe : probes[i]) {
        DifferenceProbe& result = term.probes.emplace_back();
        result.value = probe.detach();
        result.is_loss = !info.by_input && probe.is_same(evaluation->loss);
        if (!result.is_loss) {
          require_seen(probe, info.name, {&passes.gates, term.gates.get()}, passes.weights.strengths[i] > 0);
        }
      }
    }
    visitor.keep(*evaluation);
    visitor.go_on(*evaluation, probes, passes.due);  // a proof may choose another length for those behind it
    for (std::size_t i = 0; i < passes.terms.size(); ++i) {
      const TermInfo& info = passes.batch.term(i);
      for (std::size_t k = 0; k < probes[i].size(); ++k) {
        DifferenceProbe& result = passes.terms[i].probes[k];
        if (!result.is_loss) {
          split(info, passes.weights.strengths[i] > 0, probes[i][k], counted_tensors(*evaluation, info, parameters_),
                result);
        }
      }
    }
    probes.clear();

    // Last, so that the graph can go while it is differentiated.
    auto loss_gradient = gradients({evaluation->loss}, parameters_.tensors, {}, /*retain_graph=*/false,
                                   /*create_graph=*/false, "the loss");
    if (passes.due) {
      passes.loss_gradient_norm =
          squared_norm(loss_gradient, evaluation->loss.options()).sqrt().template item<double>();
    }
    bool brought = false;
    for (std::size_t i = 0; i < passes.terms.size(); ++i) {
      DifferenceTerm& term = passes.terms[i];
      for (DifferenceProbe& probe : term.probes) {
        if (probe.is_loss) {
          probe.direction = selected(loss_gradient, parameters_);
          probe.gradient = loss_gradient;
          probe.brings_loss = passes.weights.strengths[i] > 0 && !settings_.central && !brought && !passes.due;
          brought = brought || probe.brings_loss;
        }
        require_dependence(passes.batch.term(i), probe.direction, parameters_);
        probe.squared_norm = squared_norm(probe.direction, evaluation->loss.options());
        add_to(term.squared_norm, probe.squared_norm);
      }
    }
    if (!brought) {
      add_scaled(sums, std::move(loss_gradient), passes.weights.loss);
    }
  }

 private:
  /// Throws where a scalar has kinks that the scopes did not see, and a further pass would make anew.
  void require_seen(const at::Tensor& scalar, const std::string& what, const std::vector<const GateTape*>& tapes,
                    bool displaced) const {
    if (settings_.gates == Gates::free) {
      return;
    }
    const std::vector<std::string> unseen = unseen_kinks(scalar, tapes);
    if (!unseen.empty()) {
      throw GateError(
          text({what, " has an operation with a kink that cannot be frozen, ", unseen.front(),
                unseen.size() > 1 ? text({" and ", unseen.size() - 1, " more"}) : std::string(),
                ": it ran in another thread, a scripted model or a recomputation, or is left to this "
                "LibTorch (a warning said so); use Exact, or Gates::free where the difference may be another "
                "regularizer"}));
    }
    if (!displaced || settings_.own_functions == OwnFunctions::smooth) {
      return;
    }
    if (const OwnCode own = own_code({scalar}, parameters_); own.any()) {
      throw GateError(
          text({what, own.function.empty() ? " has a hook at " : " has a function of one's own, ",
                own.function.empty() ? own.hook : own.function,
                ", of which nobody but its author knows whether it has a kink, which a difference would have to "
                "freeze, or changes gradients; set .own_functions = OwnFunctions::smooth in the estimator if it does "
                "neither, else use Exact"}));
    }
  }

  /// Differentiates a probe that is not the loss: by what counts and, if `all`, by all parameters, in one pass.
  void split(const TermInfo& term, bool all, const at::Tensor& probe, const std::vector<at::Tensor>& counted,
             DifferenceProbe& result) const {
    const auto differentiate = [&](const std::vector<at::Tensor>& inputs) {
      return gradients({probe}, inputs, {}, /*retain_graph=*/true, /*create_graph=*/false, term.name);
    };
    if (!all) {
      result.direction = differentiate(counted);
    } else if (term.by_input) {
      std::vector<at::Tensor> inputs = parameters_.tensors;
      inputs.insert(inputs.end(), counted.begin(), counted.end());
      result.gradient = differentiate(inputs);
      const auto boundary = result.gradient.begin() + static_cast<std::ptrdiff_t>(parameters_.tensors.size());
      result.direction.assign(boundary, result.gradient.end());
      result.gradient.erase(boundary, result.gradient.end());
    } else {
      result.gradient = differentiate(parameters_.tensors);
      result.direction = selected(result.gradient, parameters_);
    }
  }

  DifferenceSettings settings_;
  const Parameters& parameters_;
};

}  // namespace microreg::inline MICROREG_ABI::detail
