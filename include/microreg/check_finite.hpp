/// @file
/// When values are read to see whether they are finite.
#pragma once

#include <microreg/version.hpp>

namespace microreg::inline MICROREG_ABI {

/// When a step looks for NaN and infinity before it touches `.grad`.
enum class CheckFinite {
  on_cpu,  ///< where the values are on the CPU anyway, so that a CUDA device is not synchronised
  always,  ///< every step; synchronises a CUDA device once a step, for a difference in each of its passes
  never,   ///< call Report::throw_if_not_finite() yourself
};

namespace detail {
/// Whether a value on this device may be read, for which the host waits where it is not the CPU.
constexpr bool may_look(CheckFinite looks, bool on_cpu) {
  return looks == CheckFinite::always || (looks == CheckFinite::on_cpu && on_cpu);
}
}  // namespace detail

}  // namespace microreg::inline MICROREG_ABI
