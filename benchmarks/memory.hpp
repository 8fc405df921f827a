/// @file
/// Peak memory of a step.
#pragma once

#include "case.hpp"

#include <cstdint>
#include <map>
#include <optional>
#include <string>

namespace overhead {

/// Measures steps in processes of their own on the CPU, so that no step inherits the memory of another.
class MemoryMeter {
 public:
  explicit MemoryMeter(int threads) : threads_(threads) {}

  /// Bytes that a step takes at its peak, above what the process held before its first step. On CUDA: the peak of the
  /// caching allocator above what was allocated before. Empty where the system does not say. `step` is "plain" or
  /// "penalised".
  std::optional<std::int64_t> peak_bytes(const Case& which, const std::string& step);

  /// Penalised over plain.
  std::optional<double> peak_ratio(const Case& which);

 private:
  int threads_;
  std::map<std::string, std::optional<std::int64_t>> known_;  // by arguments: many rows share a plain step
};

/// What the process of its own does: takes steps and returns the peak.
[[nodiscard]] std::optional<std::int64_t> peak_bytes_here(const Case& which, const std::string& step);

}  // namespace overhead
