/// @file
/// The loss scale of one step, and what it leaves to be divided out of gradients.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <microreg/loss_scale.hpp>
#include <microreg/report.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/tensor_lists.hpp>

#include <tuple>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// S of a step.
class Scale {
 public:
  Scale(double number) : number_(number) {}  // NOLINT(google-explicit-constructor): a number
  explicit Scale(at::Tensor scalar) : scalar_(std::move(scalar)) {}

  [[nodiscard]] bool is_one() const { return !scalar_.defined() && number_ == 1; }

  /// What a backward pass from `root` starts with; nothing, LibTorch's word for 1, where it is that.
  [[nodiscard]] std::vector<at::Tensor> seeds(const at::Tensor& root) const {
    if (is_one()) {
      return {};
    }
    return {(scalar_.defined() ? Factor(scalar_) : Factor(number_)).like(root)};
  }

  /// numerator / S^power.
  [[nodiscard]] Factor over(double numerator, int power = 1) const {
    double divisor = number_;
    for (int i = 1; i < power; ++i) {
      divisor *= number_;
    }
    return scalar_.defined() ? Factor(numerator * scalar_.pow(-power)) : Factor(numerator / divisor);
  }

  /// weight / S, where a weight that is no number meets an S of 1 alone.
  [[nodiscard]] Factor over(const Factor& weight) const { return is_one() ? weight : over(weight.number()); }

  /// squared / S^2: the squared norm of a gradient that is S times too large.
  [[nodiscard]] at::Tensor divided_out(const at::Tensor& squared) const {
    return is_one() ? squared : over(1, 2).times(squared);
  }

 private:
  double number_ = 1;
  at::Tensor scalar_;  // in place of the number, if defined
};

/// The scale of this step. A dynamic one begins in its first step.
inline Scale scale_of(const LossScale& option, ScaleState& state, c10::Device device) {
  if (!option.dynamic.has_value()) {
    return option.number;
  }
  const at::NoGradGuard no_grad;
  const auto scalar = at::TensorOptions().dtype(at::kFloat).device(device);
  if (!state.scale.defined()) {
    state.scale = at::full({}, option.number, scalar);
  }
  if (!state.good_steps.defined()) {
    state.good_steps = at::zeros({}, scalar.dtype(at::kInt));
  }
  if (!state.skipped.defined()) {
    state.skipped = at::zeros({}, scalar.dtype(at::kLong));
  }
  state.scale = state.scale.to(device);
  state.good_steps = state.good_steps.to(device);
  state.skipped = state.skipped.to(device);
  return Scale(state.scale);
}

/// Moves a dynamic scale on, and keeps a step that overflowed from `.grad`: its sums are zero then. On the device.
inline void follow(const DynamicLossScale& option, ScaleState& state, std::vector<at::Tensor>& sums, Report& report) {
  const at::NoGradGuard no_grad;
  at::Tensor finite = report.gradient_norm.isfinite();
  for (const PenaltyReport& penalty : report.penalties) {
    finite = finite.logical_and(penalty.value.isfinite().to(finite.device()));
  }
  report.overflow = finite.logical_not().to(state.scale.device());
  report.loss_scale = state.scale;
  std::tie(state.scale, state.good_steps) = at::_amp_update_scale(
      state.scale, state.good_steps, report.overflow.to(at::kFloat), option.growth, option.backoff, option.interval);
  state.skipped = state.skipped + report.overflow;
  report.gradient_norm.masked_fill_(report.overflow.to(report.gradient_norm.device()), 0);
  for (at::Tensor& sum : sums) {
    if (sum.defined()) {
      sum.masked_fill_(report.overflow.to(sum.device()), 0);
    }
  }
}

}  // namespace microreg::inline MICROREG_ABI::detail
