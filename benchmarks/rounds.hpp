/// @file
/// Interleaved timing: whatever slows the machine down for a while slows all steps of a round alike.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <vector>

namespace overhead {

struct Budget {
  std::optional<int> rounds;  ///< exactly so many; otherwise as many as fit into `seconds`, but at least three
  double seconds = 10;
};

/// Milliseconds by round and step.
using Samples = std::vector<std::vector<double>>;

[[nodiscard]] double time_ms(const std::function<void()>& step);

/// Runs the steps in turn, round after round. Each step must end synchronised with its device, warmed up.
[[nodiscard]] Samples run_rounds(std::span<const std::function<void()>> steps, const Budget& budget);

[[nodiscard]] double median(std::vector<double> values);

/// Over the rounds: the median of a step's time, and of the ratio of two steps' times in the same round.
[[nodiscard]] double median_time(const Samples& samples, std::size_t step);
[[nodiscard]] double median_ratio(const Samples& samples, std::size_t step, std::size_t reference);

}  // namespace overhead
