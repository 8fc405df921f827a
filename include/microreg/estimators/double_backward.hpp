/// @file
/// Exact differentiation of penalties by double backward.
#pragma once

#include <ATen/core/grad_mode.h>
#include <microreg/detail/gradients.hpp>
#include <microreg/parameters.hpp>
#include <microreg/penalty.hpp>
#include <microreg/squared_gradient_norm.hpp>

#include <span>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

namespace microreg::detail {

/// The probes of a penalty on one micro-batch, checked.
template <class P, class Pass>
std::vector<at::Tensor> probes_of(const P& penalty, const Pass& pass) {
  static_assert(PenaltyFor<P, Pass>,
                "microreg: this penalty cannot be evaluated on this model: it must offer probe(pass) that returns a "
                "scalar torch::Tensor, where pass.output is what the model returns");
  std::vector<at::Tensor> probes;
  if constexpr (requires { penalty.probes(pass); }) {
    probes = penalty.probes(pass);
  } else {
    probes.push_back(penalty.probe(pass));
  }
  for (const at::Tensor& probe : probes) {
    check_probe(probe, penalty.name());
  }
  return probes;
}

/// The gradients of one probe, the selected ones of which make up the penalty.
struct ProbeGradient {
  std::vector<at::Tensor> all;       // of every trainable parameter, or only of the selected ones
  std::vector<at::Tensor> selected;  // what counts in the norm
};

/// Differentiates one probe. The loss is differentiated by all parameters, since that gradient is needed anyway.
inline ProbeGradient probe_gradient(const at::Tensor& probe, bool is_loss, const Parameters& parameters,
                                    bool create_graph, std::string_view penalty) {
  std::vector<at::Tensor> inputs;
  if (is_loss || parameters.selected.size() == parameters.tensors.size()) {
    inputs = parameters.tensors;
  } else {
    for (const std::size_t i : parameters.selected) {
      inputs.push_back(parameters.tensors[i]);
    }
  }
  ProbeGradient result;
  result.all = gradients({probe}, inputs, {}, /*retain_graph=*/true, create_graph, penalty);
  if (inputs.size() == parameters.selected.size()) {
    result.selected = defined(result.all);
  } else {
    for (const std::size_t i : parameters.selected) {
      if (result.all[i].defined()) {
        result.selected.push_back(result.all[i]);
      }
    }
  }
  if (result.selected.empty()) {
    throw ModelError(c10::str(penalty, ": the probe does not depend on any selected parameter (the first is ",
                              parameters.names[parameters.selected.front()],
                              "), so the penalty would do nothing; check that the model's own output is used, and the "
                              "option select"));
  }
  return result;
}

/// Fills `squared_norms`, one a penalty, without a graph.
template <class Pass, class... P>
void squared_norms(const Pass& pass, const std::tuple<Weighted<P>...>& terms, const Parameters& parameters,
                   std::vector<at::Tensor>& squared_norms) {
  std::size_t index = 0;
  const auto measure = [&](const auto& penalty) {
    at::Tensor& squared = squared_norms[index++];
    for (const at::Tensor& probe : probes_of(penalty, pass)) {
      const auto g = probe_gradient(probe, /*is_loss=*/false, parameters, /*create_graph=*/false, penalty.name());
      const at::Tensor norm = squared_norm(g.selected, probe.options());
      squared = squared.defined() ? squared + norm : norm;
    }
  };
  std::apply([&](const auto&... term) { (measure(term.penalty), ...); }, terms);
}

/// Adds weight * grad(L_M + sum of strength * R_M) to `sums` and fills `squared_norms`, one a penalty.
///
/// The scalar R_M never exists as a graph: the backward pass of the probe's gradients g is seeded with
/// 2 * strength * weight * g. The loss joins that pass as one more root, or, where the loss is itself a probe, its
/// gradient is at hand already. Cost: one backward pass with a graph per probe, and one pass through everything.
/// A penalty with strength 0 is measured but not differentiated.
template <class Pass, class... P>
void double_backward(const Pass& pass, const std::tuple<Weighted<P>...>& terms, std::span<const double> strengths,
                     double weight, const Parameters& parameters, std::vector<at::Tensor>& sums,
                     std::vector<at::Tensor>& squared_norms) {
  std::vector<at::Tensor> roots;
  std::vector<at::Tensor> seeds;
  std::vector<at::Tensor> loss_gradient;

  const auto differentiate = [&](const auto& penalty, double strength, at::Tensor& squared) {
    for (const at::Tensor& probe : probes_of(penalty, pass)) {
      const bool is_loss = probe.is_same(pass.loss);
      ProbeGradient g = probe_gradient(probe, is_loss, parameters, strength > 0, penalty.name());
      const at::Tensor norm = squared_norm(g.selected, probe.options());
      squared = squared.defined() ? squared + norm : norm;
      if (strength > 0) {
        std::vector<at::Tensor> differentiable;
        std::copy_if(g.selected.begin(), g.selected.end(), std::back_inserter(differentiable),
                     [](const at::Tensor& gradient) { return gradient.requires_grad(); });
        if (!differentiable.empty()) {
          const at::NoGradGuard no_grad;
          auto scaled = at::_foreach_mul(differentiable, 2 * strength * weight);
          std::move(scaled.begin(), scaled.end(), std::back_inserter(seeds));
          roots.insert(roots.end(), differentiable.begin(), differentiable.end());
        }
      }
      if (is_loss && loss_gradient.empty()) {
        loss_gradient = std::move(g.all);
      }
    }
  };
  [&]<std::size_t... I>(std::index_sequence<I...>) {
    (differentiate(std::get<I>(terms).penalty, strengths[I], squared_norms[I]), ...);
  }(std::index_sequence_for<P...>{});

  if (loss_gradient.empty()) {
    roots.push_back(pass.loss);
    seeds.push_back(at::full_like(pass.loss, weight).detach());
  }
  if (!roots.empty()) {
    accumulate(sums, gradients(roots, parameters.tensors, seeds, /*retain_graph=*/false, /*create_graph=*/false,
                               "the exact penalty"));
  }
  if (!loss_gradient.empty()) {
    for (at::Tensor& gradient : loss_gradient) {
      gradient = gradient.defined() ? gradient.detach() : gradient;
    }
    accumulate(sums, std::move(loss_gradient), weight);
  }
}

}  // namespace microreg::detail
