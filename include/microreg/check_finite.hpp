/// @file
/// When values are read to see whether they are finite.
#pragma once

#include <microreg/version.hpp>

namespace microreg::inline MICROREG_ABI {

/// When a step looks for NaN and infinity before it touches `.grad`.
enum class CheckFinite {
  on_cpu,  ///< where the values are on the CPU anyway, so that a CUDA device is not synchronised
  always,  ///< every step; synchronises a CUDA device once a step
  never,   ///< call Report::throw_if_not_finite() yourself
};

}  // namespace microreg::inline MICROREG_ABI
