/// @file
/// LibTorch's own double backward of a normalisation, with a graph: what a third derivative is left to.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/autograd.h>
#include <microreg/fused/interception.hpp>
#include <microreg/fused/output_mask.hpp>

#include <array>
#include <cstddef>

namespace microreg::detail {

/// The derivatives of <seeds, backward(dy, x, weight)> by those of `inputs` (dy, x, weight) that `needs` asks for.
template <class Backward>
std::array<at::Tensor, 3> stock_double_backward(const std::array<at::Tensor, 3>& inputs,
                                                const std::array<at::Tensor, 3>& seeds, OutputMask needs,
                                                const Backward& backward) {
  const StockKernels stock;
  // Views, so that the derivative stops at them: dy itself depends on x through the network above.
  std::array<at::Tensor, 3> views = inputs;
  for (at::Tensor& view : views) {
    view = view.defined() ? view.view_as(view) : view;
  }
  const auto [d_x, d_weight, d_bias] = backward(views[0], views[1], views[2]);
  const std::array<at::Tensor, 3> outputs{d_x, d_weight, d_bias};
  torch::autograd::variable_list roots, grads, wanted;
  for (std::size_t i = 0; i < 3; ++i) {
    if (seeds[i].defined()) {
      roots.push_back(outputs[i]);
      grads.push_back(seeds[i]);
    }
    if (needs[i]) {
      wanted.push_back(views[i]);
    }
  }
  auto gradients = torch::autograd::grad(roots, wanted, grads, /*retain_graph=*/true, /*create_graph=*/true,
                                         /*allow_unused=*/true);
  std::array<at::Tensor, 3> result;
  for (std::size_t i = 0, next = 0; i < 3; ++i) {
    if (needs[i]) {
      result[i] = std::move(gradients[next++]);
    }
  }
  return result;
}

}  // namespace microreg::detail
