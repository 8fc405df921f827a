/// @file
/// Whether a number is finite, also under -ffast-math.
#pragma once

#include <bit>
#include <cstdint>

namespace microreg::detail {

/// By its bits: with -ffast-math the compiler takes std::isfinite for true.
inline bool is_finite(double value) noexcept { return (std::bit_cast<std::uint64_t>(value) >> 52 & 0x7FF) != 0x7FF; }

}  // namespace microreg::detail
