/// @file
/// What all estimators do with the probes of a penalty: check them, find the tensors that they are differentiated by,
/// and square the gradients.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <microreg/detail/gradients.hpp>
#include <microreg/micro_batch.hpp>
#include <microreg/parameters.hpp>
#include <microreg/penalty.hpp>
#include <microreg/squared_gradient_norm.hpp>

#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
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
  if (probes.empty()) {
    throw ModelError(c10::str(penalty.name(),
                              ": there is no probe, so the penalty would do nothing; return at least "
                              "one from probes(pass)"));
  }
  return probes;
}

/// The tensors in a batch that require a gradient.
template <class Input>
std::vector<at::Tensor> differentiable_tensors(Input input) {
  std::vector<at::Tensor> result;
  for_each_tensor(input, "input", [&](const at::Tensor& tensor, const std::string&) {
    if (tensor.requires_grad()) {
      result.push_back(tensor);
    }
  });
  return result;
}

/// The tensors by which the probes of P are differentiated to give what is squared: the selected parameters, or the
/// floating-point tensors of the input.
template <class P, class Pass>
std::vector<at::Tensor> counted_tensors(const P& penalty, const Pass& pass, const Parameters& parameters) {
  std::vector<at::Tensor> result;
  if constexpr (differentiates_input<P>) {
    result = differentiable_tensors(pass.input);
    if (result.empty()) {
      throw ModelError(c10::str(penalty.name(),
                                " needs a floating-point tensor in the input, to differentiate by; embed token or "
                                "class indices before the model, and pass the embeddings"));
    }
  } else {
    for (const std::size_t i : parameters.selected) {
      result.push_back(parameters.tensors[i]);
    }
  }
  return result;
}

/// Throws unless one of `gradients`, of a probe by its counted tensors, is defined.
template <class P>
void require_dependence(const P& penalty, const std::vector<at::Tensor>& gradients, const Parameters& parameters) {
  for (const at::Tensor& gradient : gradients) {
    if (gradient.defined()) {
      return;
    }
  }
  const std::string on = differentiates_input<P> ? std::string("the input")
                                                 : c10::str("any selected parameter (the first is ",
                                                            parameters.names[parameters.selected.front()], ")");
  throw ModelError(c10::str(penalty.name(), ": the probe does not depend on ", on,
                            ", so the penalty would do nothing; check that the model's own output is used, and the "
                            "option select"));
}

/// scalar / sqrt(squared), or 0 where that is 0.
inline at::Tensor over_norm(const at::Tensor& squared, double scalar) {
  return at::where(squared == 0, at::zeros_like(squared), scalar * squared.rsqrt());
}

/// tensors[i] * factor, where factor is a number or a scalar tensor on any device.
inline std::vector<at::Tensor> scaled(const std::vector<at::Tensor>& tensors, double factor) {
  return at::_foreach_mul(tensors, factor);
}
inline std::vector<at::Tensor> scaled(const std::vector<at::Tensor>& tensors, const at::Tensor& factor) {
  std::vector<at::Tensor> result;
  result.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    result.push_back(tensor * factor.to(tensor.device(), tensor.scalar_type()));
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
    const auto counted = counted_tensors(penalty, pass, parameters);
    for (const at::Tensor& probe : probes_of(penalty, pass)) {
      const auto g = gradients({probe}, counted, {}, /*retain_graph=*/true, /*create_graph=*/false, penalty.name());
      require_dependence(penalty, g, parameters);
      const at::Tensor norm = squared_norm(g, probe.options());
      squared = squared.defined() ? squared + norm : norm;
    }
  };
  std::apply([&](const auto&... term) { (measure(term.penalty), ...); }, terms);
}

/// Adds weight * grad L_M to `sums`.
inline void add_loss_gradient(const at::Tensor& loss, double weight, const Parameters& parameters,
                              std::vector<at::Tensor>& sums) {
  accumulate(sums,
             gradients({loss}, parameters.tensors, {}, /*retain_graph=*/false, /*create_graph=*/false, "the loss"),
             weight);
}

}  // namespace microreg::detail
