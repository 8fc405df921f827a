/// @file
/// Numbers that may be NaN or infinite, also under -ffast-math. There a compiler takes it that none is: it folds
/// std::isfinite, comparisons may say anything, and clang makes of a constant infinity what it likes.
#pragma once

#include <microreg/version.hpp>

#include <bit>
#include <cstdint>

namespace microreg::inline MICROREG_ABI::detail {

/// The same bits, of which the compiler knows nothing any more.
template <class Bits>
Bits forgotten(Bits bits) noexcept {
  __asm__("" : "+r"(bits));
  return bits;
}

inline bool is_finite(double value) noexcept {
  return (forgotten(std::bit_cast<std::uint64_t>(value)) >> 52 & 0x7FF) != 0x7FF;
}

/// Whether the value is not known to be at most the limit: it is above, infinite or NaN.
inline bool exceeds(double value, double limit) noexcept { return !is_finite(value) || value > limit; }

inline double unbounded() noexcept { return std::bit_cast<double>(forgotten(std::uint64_t{0x7FF0000000000000})); }

/// The next number above or below; what is not finite is the next to itself.
template <class Number, class Bits>
Number next_to(Number number, bool above) noexcept {
  constexpr Bits sign = Bits{1} << (8 * sizeof(Bits) - 1);
  const Bits bits = forgotten(std::bit_cast<Bits>(number));
  if (!is_finite(number)) {
    return number;
  }
  if ((bits & ~sign) == 0) {
    return std::bit_cast<Number>(forgotten<Bits>(above ? 1 : sign | 1));
  }
  return std::bit_cast<Number>(forgotten<Bits>(((bits & sign) == 0) == above ? bits + 1 : bits - 1));
}

}  // namespace microreg::inline MICROREG_ABI::detail
