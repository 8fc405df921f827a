/// @file
/// The gradient norms of a recorded run, for external grafting.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>

namespace cifar {

/// What metrics.jsonl of another run says of the norm of its updates' gradients, step by step: each record holds the
/// mean over the steps since the record before it. Steps beyond the last record take its value.
class RecordedNorms {
 public:
  /// Reads `run`/metrics.jsonl. Throws DataError, naming file and line, if it is missing, damaged, or without
  /// `gradient_norm`.
  explicit RecordedNorms(const std::filesystem::path& run);

  /// The norm at `step`, counted from 0.
  [[nodiscard]] double at(std::int64_t step) const;
  /// How many steps are recorded.
  [[nodiscard]] std::int64_t steps() const { return norms_.rbegin()->first; }

 private:
  std::map<std::int64_t, double> norms_;  // by updates done
};

}  // namespace cifar
