/// @file
/// Definitions of detail/text.hpp.
#pragma once

#include <microreg/detail/config.hpp>
#include <microreg/detail/text.hpp>

#include <sstream>

namespace microreg::inline MICROREG_ABI::detail {

MICROREG_INLINE std::string Piece::of(double number) {
  std::ostringstream out;
  out << number;
  const std::string words = out.str();
  return words == "-nan" ? "nan" : words;
}

MICROREG_INLINE std::string Piece::of(at::IntArrayRef shape) {
  std::ostringstream out;
  out << shape;
  return out.str();
}

MICROREG_INLINE std::string text(std::initializer_list<Piece> pieces) {
  std::string result;
  for (const Piece& piece : pieces) {
    result += piece.words();
  }
  return result;
}

}  // namespace microreg::inline MICROREG_ABI::detail
