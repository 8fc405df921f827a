/// @file
/// Differentiation of penalties by differences of first derivatives, with or without frozen gates.
#pragma once

#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/grad_mode.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/estimator.hpp>
#include <microreg/gates/scope.hpp>
#include <microreg/gates/unseen.hpp>
#include <microreg/parameters.hpp>
#include <microreg/step/differences.hpp>
#include <microreg/step/displacement.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/probes.hpp>
#include <microreg/step/snapshot.hpp>
#include <microreg/step/tensor_lists.hpp>

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace microreg::detail {

/// ForwardDifference or CentralDifference.
struct DifferenceSettings {
  double step;
  microreg::Gates gates;  // not the list of that name beside it
  bool central;
};

/// The automatic step, as a multiple of the norm of what is displaced: where the error of the difference (which grows
/// with the step, or its square) and rounding (which grows with its inverse) meet on random ReLU networks
/// (benchmarks/step_study.cpp).
inline double relative_step(const std::vector<at::Tensor>& displaced, bool central) {
  const bool fine = std::all_of(displaced.begin(), displaced.end(),
                                [](const at::Tensor& tensor) { return tensor.scalar_type() == at::kDouble; });
  if (fine) {
    return central ? 1e-6 : 1e-8;
  }
  return central ? 5e-4 : 5e-5;
}

/// The largest automatic step in float32: on wide networks, whose parameters have a large norm, the error of the
/// difference goes with the displacement itself (measured on ResNet-18 and VGG-11).
inline double largest_step(bool central) { return central ? 2e-3 : 4e-4; }

/// The first pass over a micro-batch gives the loss gradient and, for each probe s, its gradient g by what the penalty
/// counts (parameters or input) and its gradient by all parameters. Each further pass, at a point displaced along g,
/// gives the gradient of s by all parameters there; the difference over the displacement is the second derivative along
/// g. For GradientNorm all of the first pass is one backward pass. The further passes draw the same random numbers and
/// see the same buffers as the first, and leave no trace: parameters, buffers and generators are afterwards what one
/// pass leaves. Nothing is read from the device.
class FiniteDifference final : public Differences {
 public:
  FiniteDifference(const DifferenceSettings& settings, const Parameters& parameters)
      : settings_(settings), parameters_(parameters) {}

  std::vector<at::Tensor> operator()(MiniBatch& batch, const Part& part, const Weights& weights,
                                     const Snapshot& snapshot, std::vector<at::Tensor>& sums,
                                     const std::function<void(Evaluation&)>& keep) override {
    Passes passes{batch, part, weights, snapshot.now(), {}, std::vector<Term>(batch.terms()), {}, 0};
    first_pass(passes, snapshot, sums, keep);
    for (std::size_t i = 0; i < passes.terms.size(); ++i) {
      passes.terms[i].left = weights.strengths[i] > 0 ? passes.terms[i].probes.size() * (settings_.central ? 2 : 1) : 0;
      passes.left += passes.terms[i].left;
    }
    if (passes.left > 0) {
      const Snapshot after = snapshot.now();
      for (std::size_t i = 0; i < passes.terms.size(); ++i) {
        if (passes.terms[i].left > 0) {
          add_penalty(passes, i, sums);
        }
      }
      after.restore();
    }
    std::vector<at::Tensor> squared_norms;
    for (const Term& term : passes.terms) {
      squared_norms.push_back(term.squared_norm);
    }
    return squared_norms;
  }

 private:
  /// One probe in the first pass.
  struct Probe {
    std::vector<at::Tensor> gradient;   // by all parameters; empty where the penalty has strength 0
    std::vector<at::Tensor> direction;  // g: by what counts; undefined where the probe does not depend on it
    at::Tensor squared_norm;            // of g
    bool is_loss = false;
    bool brings_loss = false;  // its displaced pass adds the loss gradient too
  };
  /// One penalty in the first pass.
  struct Term {
    std::vector<Probe> probes;
    at::Tensor squared_norm;
    std::optional<GeneratorStates> generators;  // before the probes were made
    Draws draws;
    std::unique_ptr<GateTape> gates =
        std::make_unique<GateTape>();  // of the probes, which not every further pass makes
    std::size_t left = 0;              // further passes
  };
  /// One micro-batch.
  struct Passes {
    MiniBatch& batch;
    const Part& part;
    const Weights& weights;
    Snapshot before;
    GateTape gates;  // of forward pass and loss
    std::vector<Term> terms;
    std::vector<at::Tensor> inputs;
    std::size_t left;  // further passes
  };

  template <class Evaluate>
  auto recorded(GateTape& gates, const Evaluate& evaluate) const {
    std::optional<RecordGates> scope;
    if (settings_.gates == microreg::Gates::frozen) {
      scope.emplace(gates);
    }
    return evaluate();
  }

  template <class Evaluate>
  auto replayed(GateTape& gates, std::size_t left, const Evaluate& evaluate) const {
    if (settings_.gates == microreg::Gates::free) {
      return evaluate();
    }
    ReplayGates scope(gates, left > 0 ? microreg::Keep::yes : microreg::Keep::no);
    auto result = evaluate();
    scope.finish();
    return result;
  }

  void first_pass(Passes& passes, const Snapshot& snapshot, std::vector<at::Tensor>& sums,
                  const std::function<void(Evaluation&)>& keep) const {
    const auto evaluation = recorded(passes.gates, [&] { return passes.batch.evaluate(passes.part, {}); });
    if (settings_.gates == microreg::Gates::frozen) {
      require_seen(evaluation->loss, passes.gates);
    }
    passes.inputs = evaluation->inputs;
    for (std::size_t i = 0; i < passes.terms.size(); ++i) {
      const TermInfo& info = passes.batch.term(i);
      Term& term = passes.terms[i];
      term.generators.emplace(snapshot.generators().now());
      for (const at::Tensor& probe :
           recorded(*term.gates, [&] { return checked_probes(*evaluation, i, info, &term.draws); })) {
        Probe& result = term.probes.emplace_back();
        result.is_loss = !info.by_input && probe.is_same(evaluation->loss);
        if (!result.is_loss) {
          split(info, passes.weights.strengths[i] > 0, probe, counted_tensors(*evaluation, info, parameters_), result);
        }
      }
    }
    keep(*evaluation);

    // Last, so that the graph can go while it is differentiated.
    auto loss_gradient = gradients({evaluation->loss}, parameters_.tensors, {}, /*retain_graph=*/false,
                                   /*create_graph=*/false, "the loss");
    bool brought = false;
    for (std::size_t i = 0; i < passes.terms.size(); ++i) {
      Term& term = passes.terms[i];
      for (Probe& probe : term.probes) {
        if (probe.is_loss) {
          probe.direction = selected(loss_gradient, parameters_);
          probe.gradient = loss_gradient;
          probe.brings_loss = passes.weights.strengths[i] > 0 && !settings_.central && !brought;
          brought = brought || probe.brings_loss;
        }
        require_dependence(passes.batch.term(i), probe.direction, parameters_);
        probe.squared_norm = squared_norm(probe.direction, evaluation->loss.options());
        add_to(term.squared_norm, probe.squared_norm);
      }
    }
    if (!brought) {
      accumulate(sums, std::move(loss_gradient), passes.weights.loss);
    }
  }

  /// Throws where the loss has kinks that the scope did not see, and a further pass would make anew.
  static void require_seen(const at::Tensor& loss, const GateTape& gates) {
    const std::vector<std::string> unseen = unseen_kinks(loss, gates);
    if (!unseen.empty()) {
      throw GateError(
          text({"the loss has an operation with a kink that cannot be frozen, ", unseen.front(),
                unseen.size() > 1 ? text({" and ", unseen.size() - 1, " more"}) : std::string(),
                ": it ran in another thread, a scripted model or a recomputation; use Exact, or Gates::free "
                "where the difference may be another regularizer"}));
    }
  }

  /// Differentiates a probe that is not the loss: by what counts and, if `all`, by all parameters, in one pass.
  void split(const TermInfo& term, bool all, const at::Tensor& probe, const std::vector<at::Tensor>& counted,
             Probe& result) const {
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

  /// Adds weights.penalty * strength * grad R_M, one displaced pass (or two) a probe.
  void add_penalty(Passes& passes, std::size_t index, std::vector<at::Tensor>& sums) {
    const TermInfo& info = passes.batch.term(index);
    Term& term = passes.terms[index];
    const double factor = passes.weights.strengths[index] * passes.weights.penalty;
    for (std::size_t k = 0; k < term.probes.size(); ++k) {
      const Probe& probe = term.probes[k];
      const at::Tensor length = displacement_length(info, passes.inputs, probe);
      const at::Tensor per_norm = over_norm(probe.squared_norm, 1.0) * length;  // e
      // dR/dg over e: 2 ||g|| / length, or, for an unsquared norm, that over 2 R.
      const at::Tensor slope = probe.squared_norm.sqrt() / length;
      const at::Tensor scale = info.squared ? slope * (2 * factor) : slope * over_norm(term.squared_norm, factor);
      const auto displaced = [&](double times) { return displaced_gradient(passes, index, k, per_norm * times); };
      if (probe.brings_loss) {  // one sweep instead of three
        const double weight = passes.weights.loss;
        accumulate(sums, extrapolated(probe.gradient, displaced(1), scale / weight), weight);
        continue;
      }
      std::vector<at::Tensor> difference = displaced(settings_.central ? 0.5 : 1);
      subtract(difference, settings_.central ? displaced(-0.5) : probe.gradient);
      accumulate(sums, std::move(difference), scale);
    }
  }

  /// The norm of the displacement, a scalar on the device.
  at::Tensor displacement_length(const TermInfo& term, const std::vector<at::Tensor>& inputs, const Probe& probe) {
    if (settings_.step > 0) {
      return at::full_like(probe.squared_norm, settings_.step);
    }
    const at::TensorOptions scalar = probe.squared_norm.options();
    if (term.by_input) {
      return automatic_length(inputs, scalar);
    }
    if (!parameter_length_.defined()) {
      const std::vector<at::Tensor> moved = selected(parameters_.tensors, parameters_);
      check_precision(moved);
      parameter_length_ = automatic_length(moved, scalar).clamp_max(largest_step(settings_.central));
    }
    return parameter_length_.to(scalar);
  }

  at::Tensor automatic_length(const std::vector<at::Tensor>& moved, const at::TensorOptions& scalar) const {
    const at::Tensor squared = squared_norm(moved, scalar);
    // What is all zero has no scale: displace by the step itself then.
    return at::where(squared == 0, at::ones_like(squared), squared.sqrt()) * relative_step(moved, settings_.central);
  }

  /// The gradient of probe k by all parameters, with what counts moved by `distance` times its gradient.
  std::vector<at::Tensor> displaced_gradient(Passes& passes, std::size_t index, std::size_t k,
                                             const at::Tensor& distance) {
    const TermInfo& info = passes.batch.term(index);
    Term& term = passes.terms[index];
    const Probe& probe = term.probes[k];
    --passes.left;
    --term.left;
    passes.before.restore();
    std::optional<Displacement> displacement;
    std::vector<at::Tensor> inputs;
    if (info.by_input) {
      inputs = moved_inputs(passes.inputs, probe.direction, distance);
    } else {
      if (!displaceable_.has_value()) {
        require_separate_memory();
        displaceable_.emplace(selected(parameters_.tensors, parameters_));
      }
      displacement.emplace(*displaceable_, probe.direction, distance);
    }
    const auto evaluation =
        replayed(passes.gates, passes.left, [&] { return passes.batch.evaluate(passes.part, inputs); });
    term.generators->restore();
    term.draws.replay();
    const auto probes =
        replayed(*term.gates, term.left, [&] { return checked_probes(*evaluation, index, info, &term.draws); });
    if (probes.size() != term.probes.size()) {
      throw ModelError(text({info.name, ": there were ", term.probes.size(), " probes in the first pass and ",
                             probes.size(), " in a further one; return as many in every pass"}));
    }
    auto result =
        gradients({probes[k]}, parameters_.tensors, {}, /*retain_graph=*/false, /*create_graph=*/false, info.name);
    for (at::Tensor& gradient : result) {  // They will be written to, and autograd may return one tensor twice.
      gradient = gradient.defined() ? owned(std::move(gradient)) : gradient;
    }
    return result;
  }

  /// Two parameters on the same memory cannot be moved each by its own gradient.
  void require_separate_memory() const {
    for (const std::size_t i : parameters_.selected) {
      for (std::size_t j = 0; j < parameters_.tensors.size(); ++j) {
        const auto overlap =
            i == j ? at::MemOverlapStatus::No : at::get_overlap_status(parameters_.tensors[i], parameters_.tensors[j]);
        if (overlap == at::MemOverlapStatus::Full || overlap == at::MemOverlapStatus::Partial) {
          throw ModelError(text({"parameters ", parameters_.names[i], " and ", parameters_.names[j],
                                 " share memory, and a difference cannot move one alone; register one tensor in both "
                                 "places, or use Exact"}));
        }
      }
    }
  }

  /// A displacement a ten-thousandth of the parameters vanishes in half types.
  static void check_precision(const std::vector<at::Tensor>& parameters) {
    for (const at::Tensor& parameter : parameters) {
      if (parameter.scalar_type() != at::kFloat && parameter.scalar_type() != at::kDouble) {
        throw OptionError(text({"estimator.step is 0 (automatic) for parameters in ", parameter.scalar_type(),
                                ", too coarse a type for small displacements; keep the parameters in float32, choose "
                                "a step by experiment, or use Exact"}));
      }
    }
  }

  /// Leaves at inputs[i] + distance * directions[i].
  static std::vector<at::Tensor> moved_inputs(const std::vector<at::Tensor>& inputs,
                                              const std::vector<at::Tensor>& directions, const at::Tensor& distance) {
    std::vector<at::Tensor> result;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      const at::Tensor plain = inputs[i].detach();
      const at::Tensor factor = distance.to(plain.device(), plain.scalar_type());
      result.push_back(directions[i].defined() ? at::addcmul(plain, directions[i], factor) : plain);
      result.back().requires_grad_(true);
    }
    return result;
  }

  /// a -= b, where undefined is zero.
  static void subtract(std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) { accumulate(a, b, -1.0); }

  DifferenceSettings settings_;
  const Parameters& parameters_;
  std::optional<Displaceable> displaceable_;  // the selected parameters; made when first needed, as is
  at::Tensor parameter_length_;               // their automatic displacement
};

MICROREG_INLINE std::unique_ptr<Differences> make_differences(const Estimator& estimator,
                                                              const Parameters& parameters) {
  if (const auto* forward = std::get_if<ForwardDifference>(&estimator)) {
    return std::make_unique<FiniteDifference>(DifferenceSettings{forward->step, forward->gates, false}, parameters);
  }
  const auto& central = std::get<CentralDifference>(estimator);
  return std::make_unique<FiniteDifference>(DifferenceSettings{central.step, central.gates, true}, parameters);
}

}  // namespace microreg::detail
