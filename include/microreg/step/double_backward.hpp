/// @file
/// Exact differentiation of penalties by double backward.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <microreg/detail/graph_node.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/parameters.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/probes.hpp>
#include <microreg/step/tensor_lists.hpp>

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

namespace microreg::detail {

/// A scalar whose backward pass starts at `roots` with `seeds`, its value without meaning. Handed to the engine
/// themselves, seeds live until its pass ends; those that a node holds are let go with the node, so that each gradient
/// of a parameter is freed about when the next one of its size is made.
inline at::Tensor seeded_roots(const std::vector<at::Tensor>& roots, std::vector<at::Tensor> seeds) {
  at::Tensor result = at::zeros({}, roots.front().options().requires_grad(false));
  set_derivative(result, roots, "microreg::SeededRoots",
                 [seeds = std::move(seeds)](const at::Tensor& /*one*/) { return seeds; });
  return result;
}

/// The exact gradient of one micro-batch, penalty by penalty, then in one pass through everything.
///
/// The scalar R_M never exists as a graph: the backward pass of the probe's gradients g is seeded with the derivative
/// of R_M by g, which is 2 g, or g / ||g|| for an unsquared norm. The loss joins that pass as one more root, also where
/// it is itself a probe: its gradient need not be kept then. Cost: one backward pass with a graph per probe, and one
/// pass through everything. A penalty with strength 0 is measured but not differentiated; where nothing is, the loss
/// gradient that it measured is taken as it is.
class DoubleBackward {
 public:
  DoubleBackward(const Evaluation& evaluation, const Parameters& parameters)
      : evaluation_(evaluation), parameters_(parameters) {}

  /// Differentiates penalty `index` with `factor` = strength * weight, and returns its squared gradient norm.
  ///
  /// The first pass gives the gradient g itself, which is what hooks and functions of the user's own see, at any
  /// strength. A squared norm needs no copy of g for the seeds: g is scaled in place where nobody else holds it.
  at::Tensor add(std::size_t index, const TermInfo& term, double factor) {
    const bool wanted = factor > 0;
    at::Tensor squared;
    std::vector<at::Tensor> differentiable;
    for (const at::Tensor& probe : checked_probes(evaluation_, index, term)) {
      auto g = probe_gradient(term, probe, wanted);
      add_to(squared, squared_norm(g, probe.options()));
      for (at::Tensor& gradient : g) {
        if (wanted && gradient.requires_grad()) {
          differentiable.push_back(std::move(gradient));
        }
      }
    }
    if (!differentiable.empty()) {
      const at::NoGradGuard no_grad;
      auto seed = term.squared ? taken_and_scaled(differentiable, 2 * factor)
                               : scaled(differentiable, over_norm(squared, factor));
      std::move(seed.begin(), seed.end(), std::back_inserter(seeds_));
      roots_.insert(roots_.end(), differentiable.begin(), differentiable.end());
    }
    return squared;
  }

  /// The gradients of the probes, with their graph.
  [[nodiscard]] const std::vector<at::Tensor>& roots() const noexcept { return roots_; }

  /// Adds the gradient of weight * loss and of all penalties to `sums`. The graph is gone afterwards.
  void finish(double weight, std::vector<at::Tensor>& sums) {
    if (roots_.empty() && !loss_gradient_.empty()) {
      accumulate(sums, std::move(loss_gradient_), weight);
      return;
    }
    loss_gradient_.clear();
    const bool penalised = !roots_.empty();
    std::vector<at::Tensor> starts{evaluation_.loss};
    std::vector<at::Tensor> start_seeds{at::full_like(evaluation_.loss, weight).detach()};
    if (!roots_.empty()) {
      starts.push_back(seeded_roots(roots_, std::exchange(seeds_, {})));
      start_seeds.push_back(at::ones_like(starts.back()).detach());
      roots_.clear();
    }
    accumulate(sums, gradients(starts, parameters_.tensors, start_seeds, evaluation_.shares_graph,
                               /*create_graph=*/false, penalised ? "the exact penalty" : "the loss", penalised));
  }

 private:
  /// The gradient of the probe by what counts, undefined ones left out. Where no graph is wanted, the loss is
  /// differentiated by all parameters and kept, since that may be all that is needed.
  std::vector<at::Tensor> probe_gradient(const TermInfo& term, const at::Tensor& probe, bool wanted) {
    const auto differentiate = [&](const std::vector<at::Tensor>& inputs) {
      return gradients({probe}, inputs, {}, /*retain_graph=*/true, /*create_graph=*/wanted, term.name);
    };
    std::vector<at::Tensor> counted;
    if (!term.by_input && !wanted && probe.is_same(evaluation_.loss)) {
      loss_gradient_ = differentiate(parameters_.tensors);
      counted = selected(loss_gradient_, parameters_);
    } else {
      counted = differentiate(counted_tensors(evaluation_, term, parameters_));
    }
    require_dependence(term, counted, parameters_);
    return defined(counted);
  }

  const Evaluation& evaluation_;
  const Parameters& parameters_;
  std::vector<at::Tensor> roots_;
  std::vector<at::Tensor> seeds_;
  std::vector<at::Tensor> loss_gradient_;
};

/// Adds grad(weights.loss * L_M + weights.penalty * sum of strength * R_M) to `sums` and returns the squared gradient
/// norm of each penalty.
inline std::vector<at::Tensor> double_backward(const MiniBatch& batch, const Evaluation& evaluation,
                                               const Weights& weights, const Parameters& parameters,
                                               std::vector<at::Tensor>& sums) {
  std::vector<at::Tensor> squared_norms;
  DoubleBackward step(evaluation, parameters);
  try {
    for (std::size_t i = 0; i < batch.terms(); ++i) {
      squared_norms.push_back(step.add(i, batch.term(i), weights.strengths[i] * weights.penalty));
    }
    step.finish(weights.loss, sums);
  } catch (const MissingDerivative& error) {
    const std::string place = place_of(error.operation(), evaluation.loss, parameters.tensors, parameters.names);
    throw ModelError(place.empty() ? std::string(error.what()) : text({error.what(), " (it stands ", place, ")"}));
  }
  return squared_norms;
}

}  // namespace microreg::detail
