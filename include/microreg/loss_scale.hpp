/// @file
/// Where backward passes start in float16, whose gradients vanish below 6e-8 otherwise.
#pragma once

#include <microreg/version.hpp>

#include <cstdint>
#include <optional>

namespace microreg::inline MICROREG_ABI {

/// A loss scale that follows the gradients, as Micikevicius et al. propose (arXiv:1710.03740, section 3.2): a step
/// whose gradient is infinite or NaN is left out and the scale taken down; after `interval` steps in a row that are
/// not, it is taken up. All of it happens on the model's device, with the kernels of LibTorch's own scaler, and nothing
/// waits.
struct DynamicLossScale {
  double start = 65536;          ///< the first scale; positive and finite
  double growth = 2;             ///< factor after `interval` good steps, at least 1
  double backoff = 0.5;          ///< factor after a step that was left out, in (0, 1)
  std::int64_t interval = 2000;  ///< good steps in a row until it grows, at least 1
};

/// S, a number or one that follows the gradients: `.loss_scale = 1024`, `.loss_scale = DynamicLossScale{}`.
struct LossScale {
  double number = 1;                          ///< the scale, if `dynamic` is empty
  std::optional<DynamicLossScale> dynamic{};  ///< how it changes

  /// A constant, positive and finite, which Regularizer and Penalised check: OptionError.
  LossScale(double scale = 1) : number(scale) {}  // NOLINT: implicit as a number
  /// One that follows the gradients; `number` is where it starts.
  LossScale(const DynamicLossScale& moving) : number(moving.start), dynamic(moving) {}  // NOLINT
};

}  // namespace microreg::inline MICROREG_ABI
