/// @file
/// The functor form of every penalty: a scalar tensor that carries a graph, for users who compose their own loss.
#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <microreg/detail/gradients.hpp>
#include <microreg/parameters.hpp>
#include <microreg/penalty.hpp>

#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

namespace microreg {

namespace detail {

/// Whether the graph behind `roots` holds LibTorch's double backward of batch or layer normalisation, whose own
/// derivative is wrong without a word (pytorch issue 186256).
inline bool has_normalisation_double_backward(const torch::autograd::variable_list& roots) {
  std::vector<torch::autograd::Node*> open;
  std::unordered_set<torch::autograd::Node*> seen;
  const auto push = [&](torch::autograd::Node* node) {
    if (node != nullptr && seen.insert(node).second) {
      open.push_back(node);
    }
  };
  for (const at::Tensor& root : roots) {
    push(root.defined() ? root.grad_fn().get() : nullptr);
  }
  while (!open.empty()) {
    torch::autograd::Node* node = open.back();
    open.pop_back();
    const std::string name = node->name();
    const auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
    if (has("NormBackwardBackward") && (has("Batch") || has("Layer"))) {
      return true;
    }
    for (const auto& edge : node->next_edges()) {
      push(edge.function.get());
    }
  }
  return false;
}

/// The sum of squares of many tensors as one node: autograd's own composition needs three a tensor.
struct SumOfSquares : torch::autograd::Function<SumOfSquares> {
  // TensorList, and nothing else: autograd does not look for variables inside a std::vector argument.
  static at::Tensor forward(torch::autograd::AutogradContext* context, at::TensorList tensors) {
    context->save_for_backward(tensors.vec());
    return squared_norm(tensors.vec(), tensors.front().options());
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& upstream) {
    const auto tensors = context->get_saved_variables();
    if (at::GradMode::is_enabled() && has_normalisation_double_backward(tensors)) {
      throw ModelError(
          "a penalty of a network with batch or layer normalisation was differentiated with create_graph=true; "
          "LibTorch "
          "computes that third derivative wrongly; call backward() without create_graph, or compute the penalty inside "
          "a microreg::FusedScope");
    }
    torch::autograd::variable_list result;
    result.reserve(tensors.size());
    for (const at::Tensor& tensor : tensors) {
      result.push_back(tensor * (2 * upstream[0]).to(tensor.scalar_type()));
    }
    return result;
  }
};

/// Checks that `probe` is a floating-point scalar with a graph; `penalty` is named in messages.
inline void check_probe(const at::Tensor& probe, std::string_view penalty) {
  if (!probe.defined()) {
    throw ModelError(c10::str(penalty, ": the probe is an undefined tensor; it must be a scalar with a graph"));
  }
  if (probe.dim() != 0) {
    throw ModelError(c10::str(penalty, ": the probe has shape ", probe.sizes(),
                              ", it must be a scalar; reduce it with .mean() or .sum()"));
  }
  if (!probe.is_floating_point()) {
    throw ModelError(
        c10::str(penalty, ": the probe is ", c10::toString(probe.scalar_type()), ", it must be floating-point"));
  }
  if (!probe.requires_grad()) {
    throw ModelError(c10::str(penalty,
                              ": the probe carries no graph, so the penalty would do nothing; compute it from the "
                              "model's output without detach(), NoGradGuard or InferenceMode"));
  }
}

/// The sum over probes of || d(probe)/d(parameters) ||^2; see squared_gradient_norm().
inline at::Tensor summed_squared_gradient_norms(const std::vector<at::Tensor>& probes,
                                                const std::vector<at::Tensor>& parameters, std::string_view penalty) {
  std::vector<NamedParameter> named;
  named.reserve(parameters.size());
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    named.push_back({c10::str("parameters[", i, "]"), parameters[i]});
  }
  std::vector<at::Tensor> terms;
  for (const at::Tensor& probe : probes) {
    check_probe(probe, penalty);
    const auto gradient = defined(gradients({probe}, trainable(named).tensors, {}, /*retain_graph=*/true,
                                            /*create_graph=*/true, penalty));
    terms.insert(terms.end(), gradient.begin(), gradient.end());
  }
  if (terms.empty()) {
    throw ModelError(c10::str(penalty, ": the probe does not depend on any of the ", parameters.size(),
                              " parameters given, so the penalty would do nothing; pass the parameters of the model "
                              "that computed it"));
  }
  return SumOfSquares::apply(at::TensorList(terms));
}

}  // namespace detail

/// || d(probe)/d(parameters) ||^2 as a scalar tensor that carries a graph, all parameters jointly.
///
/// Parameters that are frozen or that the probe does not reach count as zero. The result is float64 for float64
/// gradients, float32 otherwise, on the probe's device. Cost: one backward pass now, about two more passes when the
/// result is differentiated; the probe's graph is kept. Throws ModelError if the probe is no floating-point scalar with
/// a graph, or if no parameter requires a gradient. Differentiating the result a second time (create_graph) throws
/// where LibTorch's third derivative is wrong.
[[nodiscard]] inline at::Tensor squared_gradient_norm(const at::Tensor& probe,
                                                      const std::vector<at::Tensor>& parameters,
                                                      std::string_view penalty = "squared_gradient_norm") {
  return detail::summed_squared_gradient_norms({probe}, parameters, penalty);
}

/// A penalty of your own: the squared gradient norm of any probe. The probe is a callable that returns a scalar tensor
/// and takes the whole ForwardPass, or (output), or (output, target).
///
/// ```cpp
/// microreg::SquaredGradientNorm penalty{[](const torch::Tensor& output) { return output.logsumexp(1).mean(); }};
/// ```
template <class Probe>
struct SquaredGradientNorm {
  Probe function;
  std::string label = "custom";

  [[nodiscard]] const std::string& name() const noexcept { return label; }

  template <class Pass>
    requires detail::ProbeCallable<Probe, Pass>
  [[nodiscard]] at::Tensor probe(const Pass& pass) const {
    static_assert(std::is_convertible_v<decltype(detail::call_probe(function, pass)), at::Tensor>,
                  "microreg: the probe must return a scalar torch::Tensor that carries a graph");
    return detail::call_probe(function, pass);
  }

  /// The functor form, for a probe that takes (output): a scalar tensor with a graph. See squared_gradient_norm().
  [[nodiscard]] at::Tensor operator()(const at::Tensor& output, const std::vector<at::Tensor>& parameters) const
    requires std::is_invocable_r_v<at::Tensor, const Probe&, const at::Tensor&>
  {
    return squared_gradient_norm(function(output), parameters, label);
  }
};
template <class Probe>
SquaredGradientNorm(Probe) -> SquaredGradientNorm<Probe>;
template <class Probe>
SquaredGradientNorm(Probe, std::string) -> SquaredGradientNorm<Probe>;

}  // namespace microreg
