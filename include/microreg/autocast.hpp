/// @file
/// Autocast: mixed precision for forward passes, which LibTorch has in C++ without a guard.
#pragma once

#include <ATen/autocast_mode.h>
#include <c10/core/DeviceType.h>
#include <c10/core/ScalarType.h>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>

namespace microreg::inline MICROREG_ABI {

/// While it lives, operations that gain by it (products, convolutions) take their tensors in a half type, on this
/// thread and this kind of device; those that need the range or the digits take float32. As torch.autocast in Python.
///
/// Around forward pass and loss, not around backward passes, which take each operation in the type it was recorded in.
/// Regularizer and Penalised switch it off for theirs, so that it may stand around them too, with the same result.
/// The option RegularizerOptions::autocast sets it for forward pass, loss and probes.
///
/// ```cpp
/// const microreg::Autocast half(torch::kCPU, torch::kBFloat16);
/// ```
class Autocast {
 public:
  /// Throws OptionError if `type` is neither kBFloat16 nor kHalf.
  explicit Autocast(c10::DeviceType device, at::ScalarType type = at::kBFloat16)
      : device_(device),
        was_enabled_(at::autocast::is_autocast_enabled(device)),
        type_before_(at::autocast::get_autocast_dtype(device)) {
    if (type != at::kBFloat16 && type != at::kHalf) {
      throw OptionError(detail::text({"the type of Autocast is ", type, "; it must be BFloat16 or Half"}));
    }
    at::autocast::set_autocast_enabled(device, true);
    at::autocast::set_autocast_dtype(device, type);
    at::autocast::increment_nesting();
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;
  ~Autocast() {
    // The copies of weights that it keeps are of these weights: the next scope may find others.
    if (at::autocast::decrement_nesting() == 0) {
      at::autocast::clear_cache();
    }
    at::autocast::set_autocast_dtype(device_, type_before_);
    at::autocast::set_autocast_enabled(device_, was_enabled_);
  }

 private:
  c10::DeviceType device_;
  bool was_enabled_;
  at::ScalarType type_before_;
};

}  // namespace microreg::inline MICROREG_ABI
