/// @file
/// Exact differentiation of penalties by double backward.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <microreg/detail/graph_node.hpp>
#include <microreg/parameters.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/probes.hpp>
#include <microreg/step/tensor_lists.hpp>

#include <algorithm>
#include <cmath>
#include <iterator>
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
  /// A squared norm needs no copy of g for the seeds: the probe is differentiated times a = sqrt(2 factor), and the
  /// gradient a g, seeded with itself, gives a^2 H g = 2 factor H g.
  at::Tensor add(std::size_t index, const TermInfo& term, double factor) {
    const bool wanted = factor > 0;
    const double root = std::sqrt(2 * factor);
    // Half types would round the scaled gradient; far from 1, squares could leave the range of float32.
    const bool folded = term.squared && root > 1e-3 && root < 1e3 && at_least_float32(parameters_.tensors);
    const double scale = folded ? root : 1.0;
    at::Tensor squared;
    std::vector<at::Tensor> differentiable;
    for (const at::Tensor& probe : checked_probes(evaluation_, index, term)) {
      const auto g = probe_gradient(term, probe, scale, wanted);
      add_to(squared, squared_norm(g, probe.options()) / (scale * scale));
      std::copy_if(g.begin(), g.end(), std::back_inserter(differentiable),
                   [&](const at::Tensor& gradient) { return wanted && gradient.requires_grad(); });
    }
    if (!differentiable.empty()) {
      const at::NoGradGuard no_grad;
      auto seed = folded         ? detached(differentiable)
                  : term.squared ? scaled(differentiable, 2 * factor)
                                 : scaled(differentiable, over_norm(squared, factor));
      std::move(seed.begin(), seed.end(), std::back_inserter(seeds_));
      roots_.insert(roots_.end(), differentiable.begin(), differentiable.end());
    }
    return squared;
  }

  /// Adds the gradient of weight * loss and of all penalties to `sums`. The graph is gone afterwards.
  void finish(double weight, std::vector<at::Tensor>& sums) {
    if (roots_.empty() && !loss_gradient_.empty()) {
      accumulate(sums, std::move(loss_gradient_), weight);
      return;
    }
    loss_gradient_.clear();
    std::vector<at::Tensor> starts{evaluation_.loss};
    std::vector<at::Tensor> start_seeds{at::full_like(evaluation_.loss, weight).detach()};
    if (!roots_.empty()) {
      starts.push_back(seeded_roots(roots_, std::exchange(seeds_, {})));
      start_seeds.push_back(at::ones_like(starts.back()).detach());
      roots_.clear();
    }
    accumulate(sums, gradients(starts, parameters_.tensors, start_seeds, /*retain_graph=*/false,
                               /*create_graph=*/false, "the exact penalty"));
  }

 private:
  /// The gradient of scale * probe by what counts, undefined ones left out. Where no graph is wanted, the loss is
  /// differentiated by all parameters and kept, since that may be all that is needed.
  std::vector<at::Tensor> probe_gradient(const TermInfo& term, const at::Tensor& probe, double scale, bool wanted) {
    const auto differentiate = [&](const std::vector<at::Tensor>& inputs) {
      return gradients({probe}, inputs, {at::full_like(probe, scale).detach()}, /*retain_graph=*/true,
                       /*create_graph=*/wanted, term.name);
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
  for (std::size_t i = 0; i < batch.terms(); ++i) {
    squared_norms.push_back(step.add(i, batch.term(i), weights.strengths[i] * weights.penalty));
  }
  step.finish(weights.loss, sums);
  return squared_norms;
}

}  // namespace microreg::detail
