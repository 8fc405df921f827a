/// @file
/// Exact differentiation of penalties by double backward.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <microreg/detail/gradients.hpp>
#include <microreg/detail/penalised.hpp>
#include <microreg/estimators/probes.hpp>
#include <microreg/parameters.hpp>
#include <microreg/penalty.hpp>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

namespace microreg::detail {

/// Differentiates `scale` times one probe, with a graph if `create_graph`. Without one, the loss is differentiated by
/// all parameters, since that gradient may be all that is needed: it is put into `loss_gradient`. Returns the gradients
/// that count, undefined ones left out.
template <class P, class Pass>
std::vector<at::Tensor> probe_gradient(const P& penalty, const Pass& pass, const at::Tensor& probe, double scale,
                                       const Parameters& parameters, bool create_graph,
                                       std::vector<at::Tensor>& loss_gradient) {
  const auto differentiate = [&](const std::vector<at::Tensor>& inputs) {
    return gradients({probe}, inputs, {at::full_like(probe, scale).detach()}, /*retain_graph=*/true, create_graph,
                     penalty.name());
  };
  std::vector<at::Tensor> counted;
  if (!differentiates_input<P> && !create_graph && probe.is_same(pass.loss)) {
    loss_gradient = differentiate(parameters.tensors);
    for (const std::size_t i : parameters.selected) {
      counted.push_back(loss_gradient[i]);
    }
  } else {
    counted = differentiate(counted_tensors(penalty, pass, parameters));
  }
  require_dependence(penalty, counted, parameters);
  return defined(counted);
}

/// A scalar whose backward pass starts at `roots` with `seeds`, its value without meaning. Handed to the engine
/// themselves, seeds live until its pass ends; those that a node has saved are let go with the node, so that each
/// gradient of a parameter is freed about when the next one of its size is made.
struct SeededRoots : torch::autograd::Function<SeededRoots> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, at::TensorList roots,
                            const std::vector<at::Tensor>& seeds) {
    context->save_for_backward(seeds);
    return at::zeros({}, roots.front().options());
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& /*one*/) {
    torch::autograd::variable_list result = context->get_saved_variables();
    result.emplace_back();  // for the argument `seeds`
    return result;
  }
};

inline bool at_least_float32(const std::vector<at::Tensor>& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const at::Tensor& tensor) {
    return tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble;
  });
}

/// Adds grad(weights.loss * L_M + weights.penalty * sum of strength * R_M) to `sums` and fills `squared_norms`, one a
/// penalty.
///
/// The scalar R_M never exists as a graph: the backward pass of the probe's gradients g is seeded with the derivative
/// of R_M by g, which is 2 g, or g / ||g|| for an unsquared norm. The loss joins that pass as one more root, also where
/// it is itself a probe: its gradient need not be kept then. Cost: one backward pass with a graph per probe, and one
/// pass through everything. A penalty with strength 0 is measured but not differentiated; where nothing is, the loss
/// gradient that it measured is taken as it is.
///
/// A squared norm needs no copy of g for the seeds: with the factor f = strength * weight, the probe is differentiated
/// times a = sqrt(2 f), and the gradient a g, seeded with itself, gives a^2 H g = 2 f H g.
template <class Pass, class... P>
void double_backward(const Pass& pass, const std::tuple<Weighted<P>...>& terms, std::span<const double> strengths,
                     const MicroBatchWeights& weights, const Parameters& parameters, std::vector<at::Tensor>& sums,
                     std::vector<at::Tensor>& squared_norms) {
  std::vector<at::Tensor> roots;
  std::vector<at::Tensor> seeds;
  std::vector<at::Tensor> loss_gradient;

  const auto differentiate = [&]<class Q>(const Q& penalty, double strength, at::Tensor& squared) {
    const double factor = strength * weights.penalty;
    const double root = std::sqrt(2 * factor);
    // Half types would round the scaled gradient; far from 1, squares could leave the range of float32.
    const bool folded = is_squared<Q> && root > 1e-3 && root < 1e3 && at_least_float32(parameters.tensors);
    const double scale = folded ? root : 1.0;
    std::vector<at::Tensor> differentiable;
    for (const at::Tensor& probe : probes_of(penalty, pass)) {
      const auto g = probe_gradient(penalty, pass, probe, scale, parameters, strength > 0, loss_gradient);
      const at::Tensor norm = squared_norm(g, probe.options()) / (scale * scale);
      squared = squared.defined() ? squared + norm : norm;
      std::copy_if(g.begin(), g.end(), std::back_inserter(differentiable),
                   [&](const at::Tensor& gradient) { return strength > 0 && gradient.requires_grad(); });
    }
    if (!differentiable.empty()) {
      const at::NoGradGuard no_grad;
      auto seed = folded          ? detached(differentiable)
                  : is_squared<Q> ? scaled(differentiable, 2 * factor)
                                  : scaled(differentiable, over_norm(squared, factor));
      std::move(seed.begin(), seed.end(), std::back_inserter(seeds));
      roots.insert(roots.end(), differentiable.begin(), differentiable.end());
    }
  };
  [&]<std::size_t... I>(std::index_sequence<I...>) {
    (differentiate(std::get<I>(terms).penalty, strengths[I], squared_norms[I]), ...);
  }(std::index_sequence_for<P...>{});

  if (roots.empty() && !loss_gradient.empty()) {
    accumulate(sums, std::move(loss_gradient), weights.loss);
    return;
  }
  loss_gradient.clear();
  std::vector<at::Tensor> starts{pass.loss};
  std::vector<at::Tensor> start_seeds{at::full_like(pass.loss, weights.loss).detach()};
  if (!roots.empty()) {
    starts.push_back(SeededRoots::apply(at::TensorList(roots), std::exchange(seeds, {})));
    start_seeds.push_back(at::ones_like(starts.back()).detach());
    roots.clear();
  }
  accumulate(sums, gradients(starts, parameters.tensors, start_seeds, /*retain_graph=*/false, /*create_graph=*/false,
                             "the exact penalty"));
}

}  // namespace microreg::detail
