/// @file
/// Definitions of penalty.hpp.
#pragma once

#include <microreg/detail/config.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/penalty.hpp>

namespace microreg::inline MICROREG_ABI {

MICROREG_INLINE at::Tensor Draws::keep(const at::Tensor& fresh) {
  if (!replaying_) {
    recorded_.push_back(fresh);
    return fresh;
  }
  if (position_ == recorded_.size()) {
    throw ModelError(detail::text({"a probe drew more than the ", recorded_.size(),
                                   " random tensors of its first pass over the micro-batch; draw as often in every "
                                   "pass"}));
  }
  return recorded_[position_++];
}

MICROREG_INLINE const at::Tensor& differentiable_output(const at::Tensor& output, std::string_view penalty) {
  if (!output.defined() || output.dim() == 0 || output.size(0) == 0) {
    throw ModelError(detail::text({penalty, " needs an output of shape [M, ...] with at least one sample, got ",
                                   output.defined() ? detail::text({"shape ", output.sizes()})
                                                    : "an undefined tensor; hand it over: backward(loss, output)"}));
  }
  if (!output.is_floating_point()) {
    throw ModelError(detail::text({penalty, " needs a floating-point output, got ", c10::toString(output.scalar_type()),
                                   "; return the logits or predictions, not class indices"}));
  }
  return output;  // NOLINT(bugprone-return-const-ref-from-parameter): lives as long as the caller's expression
}

}  // namespace microreg::inline MICROREG_ABI
