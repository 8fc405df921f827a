/// @file
/// Whether a number is finite, also under -ffast-math. A comparison says nothing there about numbers that may not be.
#pragma once

#include <microreg/version.hpp>

#include <bit>
#include <cstdint>

namespace microreg::inline MICROREG_ABI::detail {

/// By its bits: with -ffast-math the compiler takes std::isfinite for true.
inline bool is_finite(double value) noexcept { return (std::bit_cast<std::uint64_t>(value) >> 52 & 0x7FF) != 0x7FF; }

}  // namespace microreg::inline MICROREG_ABI::detail
