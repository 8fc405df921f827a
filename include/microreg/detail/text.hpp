/// @file
/// The texts of errors. A template for each list of types would cost every user's compiler; this is one function.
#pragma once

#include <ATen/core/Tensor.h>
#include <microreg/version.hpp>

#include <concepts>
#include <initializer_list>
#include <string>
#include <string_view>

namespace microreg::inline MICROREG_ABI::detail {

/// One part of a text: words, a number, a shape, a type or a device, written as LibTorch writes them.
class Piece {
 public:
  Piece(const char* words) : words_(words) {}         // NOLINT(google-explicit-constructor): and so on
  Piece(const std::string& words) : words_(words) {}  // NOLINT
  Piece(std::string_view words) : words_(words) {}    // NOLINT
  Piece(std::integral auto number) : words_(std::to_string(number)) {}  // NOLINT
  Piece(double number) : words_(of(number)) {}                          // NOLINT
  Piece(at::IntArrayRef shape) : words_(of(shape)) {}                   // NOLINT
  Piece(at::ScalarType type) : words_(c10::toString(type)) {}           // NOLINT
  Piece(c10::Device device) : words_(device.str()) {}                   // NOLINT

  [[nodiscard]] const std::string& words() const noexcept { return words_; }

 private:
  static std::string of(double number);
  static std::string of(at::IntArrayRef shape);

  std::string words_;
};

/// The pieces in a row.
std::string text(std::initializer_list<Piece> pieces);

}  // namespace microreg::inline MICROREG_ABI::detail

#if !defined(MICROREG_COMPILED)
#include <microreg/definitions/text.hpp>
#endif
