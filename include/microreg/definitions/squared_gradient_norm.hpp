/// @file
/// Definitions of squared_gradient_norm.hpp: one node for the sum of squares, and the third derivatives that it
/// refuses.
#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/graph_node.hpp>
#include <microreg/detail/graph_walk.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/parameters.hpp>
#include <microreg/squared_gradient_norm.hpp>
#include <microreg/step/gradients.hpp>
#include <microreg/step/tensor_lists.hpp>

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// Whether the graph behind `roots` holds LibTorch's double backward of batch or layer normalisation, whose own
/// derivative is wrong without a word (pytorch issue 186256).
inline bool has_normalisation_double_backward(const torch::autograd::variable_list& roots) {
  bool found = false;
  for_each_node(nodes_of(roots), [&](const torch::autograd::Node& /*node*/, NodeKind kind) {
    found = found || kind == NodeKind::norm_backward;
  });
  return found;
}

/// The sum of squares of many tensors as one node: autograd's own composition needs three a tensor.
inline at::Tensor sum_of_squares(const std::vector<at::Tensor>& tensors) {
  at::Tensor result = squared_norm(tensors, tensors.front().options());
  auto saved = std::make_shared<std::vector<torch::autograd::SavedVariable>>();
  for (const at::Tensor& tensor : tensors) {
    saved->emplace_back(tensor, /*is_output=*/false);
  }
  set_derivative(result, edges_of(tensors), "microreg::SumOfSquares", [saved](const at::Tensor& upstream) {
    std::vector<at::Tensor> gradients;
    for (const torch::autograd::SavedVariable& variable : *saved) {
      gradients.push_back(variable.unpack());
    }
    if (at::GradMode::is_enabled() && has_normalisation_double_backward(gradients)) {
      throw ModelError(
          "a penalty of a network with batch or layer normalisation was differentiated with create_graph=true; "
          "LibTorch computes that third derivative wrongly; call backward() without create_graph, or compute the "
          "penalty inside a microreg::FusedScope");
    }
    for (at::Tensor& gradient : gradients) {
      gradient = gradient * (2 * upstream).to(gradient.device(), gradient.scalar_type());
    }
    return gradients;
  });
  return result;
}

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
  return sum_of_squares(terms);
}

}  // namespace microreg::inline MICROREG_ABI::detail
