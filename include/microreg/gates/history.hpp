/// @file
/// How a replayed operation tells autograd what it did.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/variable.h>
#include <microreg/detail/graph_node.hpp>

#include <functional>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail::gating {

/// Makes `result` a function of `operand` with this gradient, also where they are one tensor.
inline void set_gradient(const at::Tensor& result, const at::Tensor& operand,
                         std::function<at::Tensor(const at::Tensor& upstream)> gradient) {
  if (at::GradMode::is_enabled() && operand.requires_grad()) {
    set_derivative(result, edges_of(operand), "ReplayBackward",
                   [gradient = std::move(gradient)](const at::Tensor& upstream) -> std::vector<at::Tensor> {
                     return {gradient(upstream)};
                   });
  }
}

/// What an operation in place does with the result of its form out of place. To a view goes LibTorch's own copy, which
/// knows the gradient of the rest of its base; to another tensor the values and their history, without the gradient of
/// zeros that a copy would send to what was there.
inline void write_back(at::Tensor self, const at::Tensor& value) {
  if (self.is_view()) {
    self.copy_(value);
  } else if (!value.is_same(self)) {
    {
      const at::NoGradGuard no_grad;
      self.copy_(value);
    }
    if (value.requires_grad()) {
      torch::autograd::impl::set_gradient_edge(self, torch::autograd::impl::gradient_edge(value));
    }
  }
}

/// Gives a result the values of the first pass, whatever autograd knows about it.
inline void replace_values(const at::Tensor& result, const at::Tensor& values) {
  const at::NoGradGuard no_grad;
  result.variable_data().copy_(values);
}

}  // namespace microreg::inline MICROREG_ABI::detail::gating
