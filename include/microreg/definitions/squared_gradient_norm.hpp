/// @file
/// Definitions of squared_gradient_norm.hpp: one node for the sum of squares, and the third derivatives that it
/// refuses.
#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/parameters.hpp>
#include <microreg/squared_gradient_norm.hpp>
#include <microreg/step/tensor_lists.hpp>

#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

namespace microreg::detail {

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

MICROREG_INLINE void check_probe(const at::Tensor& probe, std::string_view penalty) {
  if (!probe.defined()) {
    throw ModelError(text({penalty, ": the probe is an undefined tensor; it must be a scalar with a graph"}));
  }
  if (probe.dim() != 0) {
    throw ModelError(text(
        {penalty, ": the probe has shape ", probe.sizes(), ", it must be a scalar; reduce it with .mean() or .sum()"}));
  }
  if (!probe.is_floating_point()) {
    throw ModelError(
        text({penalty, ": the probe is ", c10::toString(probe.scalar_type()), ", it must be floating-point"}));
  }
  if (!probe.requires_grad()) {
    throw ModelError(text({penalty,
                           ": the probe carries no graph, so the penalty would do nothing; compute it from the "
                           "model's output without detach(), NoGradGuard or InferenceMode"}));
  }
}

MICROREG_INLINE at::Tensor summed_squared_gradient_norms(const std::vector<at::Tensor>& probes,
                                                         const std::vector<at::Tensor>& parameters,
                                                         std::string_view penalty) {
  std::vector<NamedParameter> named;
  named.reserve(parameters.size());
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    named.push_back({text({"parameters[", i, "]"}), parameters[i]});
  }
  std::vector<at::Tensor> terms;
  for (const at::Tensor& probe : probes) {
    check_probe(probe, penalty);
    const auto gradient = defined(gradients({probe}, trainable(named).tensors, {}, /*retain_graph=*/true,
                                            /*create_graph=*/true, penalty));
    terms.insert(terms.end(), gradient.begin(), gradient.end());
  }
  if (terms.empty()) {
    throw ModelError(text({penalty, ": the probe does not depend on any of the ", parameters.size(),
                           " parameters given, so the penalty would do nothing; pass the parameters of the model "
                           "that computed it"}));
  }
  return SumOfSquares::apply(at::TensorList(terms));
}

}  // namespace microreg::detail
