/// @file
/// How a replayed operation tells autograd what it did.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/node.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <functional>
#include <string>
#include <utility>

namespace microreg::detail::gating {

/// A node whose gradient is a function. torch::autograd::Function would do, at ten seconds of every user's compiler.
class ReplayBackward final : public torch::autograd::Node {
 public:
  using Gradient = std::function<at::Tensor(const at::Tensor& upstream)>;

  ReplayBackward(const at::Tensor& operand, Gradient gradient)
      : Node(torch::autograd::edge_list{torch::autograd::impl::gradient_edge(operand)}),
        gradient_(std::move(gradient)) {}

  torch::autograd::variable_list apply(torch::autograd::variable_list&& upstream) override {
    TORCH_CHECK(gradient_ != nullptr, torch::autograd::ERR_BACKWARD_TWICE);
    return {upstream[0].defined() ? gradient_(upstream[0]) : at::Tensor()};
  }
  void release_variables() override { gradient_ = nullptr; }
  [[nodiscard]] std::string name() const override { return "ReplayBackward"; }

 private:
  Gradient gradient_;
};

/// Makes `result` a function of `operand` with this gradient, also where they are one tensor.
inline void set_gradient(const at::Tensor& result, const at::Tensor& operand, ReplayBackward::Gradient gradient) {
  if (at::GradMode::is_enabled() && operand.requires_grad()) {
    auto node = c10::make_intrusive<ReplayBackward>(operand, std::move(gradient));
    const std::uint32_t number = node->add_input_metadata(result);
    torch::autograd::impl::set_gradient_edge(result, {std::move(node), number});
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

}  // namespace microreg::detail::gating
