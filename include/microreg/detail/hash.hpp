/// @file
/// A hash of bytes, the same on every machine of one byte order: FNV-1a.
#pragma once

#include <microreg/version.hpp>

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <type_traits>

namespace microreg::inline MICROREG_ABI::detail {

class Hash {
 public:
  void add(const void* bytes, std::size_t count) noexcept {
    for (std::size_t i = 0; i < count; ++i) {
      value_ = (value_ ^ static_cast<const unsigned char*>(bytes)[i]) * 1099511628211U;
    }
  }
  template <class T>
    requires(std::is_arithmetic_v<T> || std::is_enum_v<T>)
  void add(T number) noexcept {
    add(&number, sizeof number);
  }
  void add(std::string_view words) noexcept { add(words.data(), words.size()); }

  [[nodiscard]] std::uint64_t value() const noexcept { return value_; }

 private:
  std::uint64_t value_ = 14695981039346656037U;
};

}  // namespace microreg::inline MICROREG_ABI::detail
