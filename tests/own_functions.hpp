/// @file
/// Functions of a user's own, whose backward LibTorch and the library cannot see into.
#pragma once

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/torch.h>
#include <microreg/detail/libtorch.hpp>

#include <utility>

namespace helpers {

/// ReLU: a kink that only its own backward knows.
struct OwnKink : torch::autograd::Function<OwnKink> {
  static torch::Tensor forward(torch::autograd::AutogradContext* context, const torch::Tensor& x) {
    context->save_for_backward({x});
    return x.clamp_min(0);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list upstream) {
    return {upstream[0] * (context->get_saved_variables()[0] > 0)};
  }
};

/// Gradient reversal: linear, and not the derivative of its forward.
struct Reversal : torch::autograd::Function<Reversal> {
  static torch::Tensor forward(torch::autograd::AutogradContext* /*context*/, const torch::Tensor& x) {
    return x.clone();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* /*context*/,
                                                 torch::autograd::variable_list upstream) {
    return {upstream[0] * -0.5};
  }
};

/// A node of autograd's that is derived from it directly: twice the gradient of what it does.
struct OwnNode : torch::autograd::Node {
  using Node::Node;
  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override {
    return {gradients[0] * 2};
  }
};
inline torch::Tensor through_own_node(const torch::Tensor& x) {
  torch::Tensor result = x.detach().clone();
  const auto node = microreg::detail::make_node<OwnNode>(torch::autograd::collect_next_edges(x));
  torch::autograd::create_gradient_edge(result, node);
  return result;
}

}  // namespace helpers
