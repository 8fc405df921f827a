/// @file
/// What all estimators do with the probes of a penalty: check them, find the tensors that they are differentiated by,
/// and square the gradients.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/parameters.hpp>
#include <microreg/squared_gradient_norm.hpp>
#include <microreg/step/gradients.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/scaling.hpp>
#include <microreg/step/tensor_lists.hpp>

#include <algorithm>
#include <string>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// The probes of penalty `index`, checked.
inline std::vector<at::Tensor> checked_probes(const Evaluation& evaluation, std::size_t index, const TermInfo& term,
                                              Draws* draws = nullptr) {
  std::vector<at::Tensor> probes = evaluation.probes(index, draws);
  for (const at::Tensor& probe : probes) {
    check_probe(probe, term.name);
  }
  if (probes.empty()) {
    throw ModelError(text({term.name,
                           ": there is no probe, so the penalty would do nothing; return at least one from "
                           "probes(pass)"}));
  }
  return probes;
}

/// Those of every penalty.
inline std::vector<std::vector<at::Tensor>> all_probes(const MiniBatch& batch, const Evaluation& evaluation) {
  std::vector<std::vector<at::Tensor>> result;
  for (std::size_t i = 0; i < batch.terms(); ++i) {
    result.push_back(checked_probes(evaluation, i, batch.term(i)));
  }
  return result;
}

inline std::vector<at::Tensor> selected(const std::vector<at::Tensor>& tensors, const Parameters& parameters) {
  std::vector<at::Tensor> result;
  result.reserve(parameters.selected.size());
  for (const std::size_t i : parameters.selected) {
    result.push_back(tensors[i]);
  }
  return result;
}

/// The tensors by which the probes are differentiated to give what is squared: the selected parameters, or the
/// floating-point tensors of the input.
inline std::vector<at::Tensor> counted_tensors(const Evaluation& evaluation, const TermInfo& term,
                                               const Parameters& parameters) {
  if (!term.by_input) {
    return selected(parameters.tensors, parameters);
  }
  if (evaluation.inputs.empty()) {
    throw ModelError(text({term.name,
                           " needs a floating-point tensor in the input, to differentiate by; embed token or class "
                           "indices before the model, and pass the embeddings (to Penalised as PassTensors::input)"}));
  }
  return evaluation.inputs;
}

/// Throws unless one of `gradients`, of a probe by its counted tensors, is defined.
inline void require_dependence(const TermInfo& term, const std::vector<at::Tensor>& gradients,
                               const Parameters& parameters) {
  if (std::any_of(gradients.begin(), gradients.end(), [](const at::Tensor& each) { return each.defined(); })) {
    return;
  }
  throw ModelError(text({term.name, ": the probe does not depend on ",
                         term.by_input ? std::string("the input")
                                       : text({"any selected parameter (the first is ",
                                               parameters.names[parameters.selected.front()], ")"}),
                         ", so the penalty would do nothing; check that the model's own output is used, and the "
                         "option select"}));
}

/// `sum` + `value`, where an undefined sum is zero.
inline void add_to(at::Tensor& sum, const at::Tensor& value) { sum = sum.defined() ? sum + value : value; }

/// The squared gradient norm of each penalty, from its probes, without a graph for more.
inline std::vector<at::Tensor> squared_norms(const MiniBatch& batch, const Evaluation& evaluation,
                                             const std::vector<std::vector<at::Tensor>>& probes,
                                             const Parameters& parameters, const Scale& scale) {
  std::vector<at::Tensor> result(batch.terms());
  for (std::size_t i = 0; i < result.size(); ++i) {
    const TermInfo& term = batch.term(i);
    const auto counted = counted_tensors(evaluation, term, parameters);
    for (const at::Tensor& probe : probes[i]) {
      const auto g = gradients({probe}, counted, scale.seeds(probe), /*retain_graph=*/true,
                               /*create_graph=*/false, term.name);
      require_dependence(term, g, parameters);
      add_to(result[i], scale.divided_out(squared_norm(g, probe.options())));
    }
  }
  return result;
}

/// What one micro-batch gives to a step.
struct Estimated {
  std::vector<at::Tensor> squared_norms;              ///< of the gradient of each penalty
  std::vector<WeightedGradients> gradients = {};      ///< of loss and penalties, to be added up
  std::vector<WeightedGradients> loss_gradient = {};  ///< of the loss alone, where it is asked for
  bool replayed = false;                              ///< from a recording
};

/// What one penalised micro-batch counts, and how strong each penalty is in this step.
struct Weights {
  double loss;                           ///< weight(M)
  double penalty;                        ///< weight(M) times the factor of sampling; 0: not penalised in this step
  const std::vector<double>& strengths;  ///< of the step, one a penalty
  /// What on_loss() and on_penalty() are instead, where a recording is to be repeated with other numbers: scalars on
  /// the device, one for the loss and one a penalty. The numbers say then what is 0.
  const std::vector<at::Tensor>* scalars = nullptr;

  [[nodiscard]] Factor on_loss() const { return scalars == nullptr ? Factor(loss) : Factor(scalars->front()); }
  [[nodiscard]] Factor on_penalty(std::size_t i) const {
    return scalars == nullptr ? Factor(strengths[i] * penalty) : Factor((*scalars)[i + 1]);
  }
};

}  // namespace microreg::inline MICROREG_ABI::detail
