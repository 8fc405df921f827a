/// @file
/// Choices that depend on a seed alone, whatever the standard library.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <random>

namespace differential {

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}

  /// Uniform in [0, bound).
  [[nodiscard]] std::int64_t below(std::int64_t bound) {
    return static_cast<std::int64_t>(engine_() % static_cast<std::uint64_t>(bound));
  }
  /// Uniform in [least, most].
  [[nodiscard]] std::int64_t between(std::int64_t least, std::int64_t most) { return least + below(most - least + 1); }
  /// True once in so many times.
  [[nodiscard]] bool once_in(std::int64_t times) { return below(times) == 0; }
  template <class T>
  [[nodiscard]] T of(std::initializer_list<T> values) {
    return values.begin()[below(static_cast<std::int64_t>(values.size()))];
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace differential
