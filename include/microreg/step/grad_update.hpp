/// @file
/// What a step adds to the `.grad` fields, all at its end.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <microreg/version.hpp>

#include <cstddef>
#include <mutex>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// `gradient` with the strides of its parameter, as LibTorch's own accumulation promises; contiguous for a parameter
/// whose memory overlaps or has gaps.
inline at::Tensor laid_out_as(const at::Tensor& parameter, const at::Tensor& gradient) {
  if (!parameter.is_non_overlapping_and_dense()) {
    return gradient.to(parameter.scalar_type()).contiguous();
  }
  if (gradient.strides() == parameter.strides() && gradient.scalar_type() == parameter.scalar_type()) {
    return gradient;
  }
  return at::empty_strided(parameter.sizes(), parameter.strides(), parameter.options().requires_grad(false))
      .copy_(gradient);
}

/// What a step adds to the `.grad` fields of `parameters`, outside of any graph.
class GradUpdate {
 public:
  /// Allocates all that is needed.
  GradUpdate(const std::vector<at::Tensor>& parameters, const std::vector<at::Tensor>& sums) {
    const std::lock_guard lock(one_at_a_time());
    const at::NoGradGuard no_grad;
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      if (!sums[i].defined()) {
        continue;
      }
      if (parameters[i].grad().defined()) {
        into_.push_back(parameters[i].grad());
        from_.push_back(sums[i]);
      } else {
        without_.emplace_back(parameters[i], laid_out_as(parameters[i], sums[i]));
      }
    }
  }

  void write() {
    const std::lock_guard lock(one_at_a_time());
    const at::NoGradGuard no_grad;
    if (!into_.empty()) {
      at::_foreach_add_(into_, from_);
    }
    for (auto& [parameter, gradient] : without_) {  // last, since nothing throws any more
      if (parameter.grad().defined()) {             // by the other thread, meanwhile
        parameter.mutable_grad().add_(gradient);
      } else {
        parameter.mutable_grad() = std::move(gradient);
      }
    }
  }

 private:
  /// Two threads may step on one model, and plain accumulation is safe there.
  static std::mutex& one_at_a_time() {
    static std::mutex mutex;
    return mutex;
  }

  std::vector<at::Tensor> into_;
  std::vector<at::Tensor> from_;
  std::vector<std::pair<at::Tensor, at::Tensor>> without_;
};

}  // namespace microreg::inline MICROREG_ABI::detail
