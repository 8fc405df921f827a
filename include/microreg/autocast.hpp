/// @file
/// Autocast: mixed precision for forward passes, which LibTorch has in C++ without a guard.
#pragma once

#include <c10/core/DeviceType.h>
#include <c10/core/ScalarType.h>
#include <microreg/version.hpp>

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
  explicit Autocast(c10::DeviceType device, at::ScalarType type = at::kBFloat16);
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;
  ~Autocast();

 private:
  c10::DeviceType device_;
  bool was_enabled_;
  at::ScalarType type_before_;
};

}  // namespace microreg::inline MICROREG_ABI

#if !defined(MICROREG_COMPILED)
#include <microreg/definitions/autocast.hpp>
#endif
