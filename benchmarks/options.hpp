/// @file
/// The command line.
#pragma once

#include "case.hpp"
#include "rounds.hpp"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace overhead {

struct Options {
  bool quick = false;
  // Filters; empty: the plan's own choice.
  std::vector<std::string> models;
  std::vector<std::string> layouts;
  std::vector<std::string> penalties;
  std::vector<std::string> estimators;
  std::vector<std::int64_t> micro_batches;
  std::string fused = "both";
  std::vector<std::string> fused_operations;  ///< of this process, all others are LibTorch's; empty: no limit

  int threads = 0;           ///< 0: LibTorch's choice
  std::int64_t workers = 0;  ///< of --serve and --memory-of
  std::string device = "cpu";
  std::string autocast = "float32";
  bool tf32 = false;  ///< on CUDA: round the operands of products and convolutions to TF32
  std::string malloc = "tuned";
  std::optional<int> rounds;
  std::optional<double> seconds;  ///< per row
  bool memory = true;
  std::optional<bool> sweeps;  ///< by default only in a full run without filters
  std::string json;
  std::string sweep_json;

  std::int64_t batch = 0;        ///< of --serve and --memory-of
  double micro_batch_share = 1;  ///< likewise
  bool kernels = false;          ///< print where one step of the device's time goes, and end
  bool serve = false;            ///< take orders from the standard input, for peers/compare.py
  std::string state;             ///< with serve: where to write weights and data
  std::string memory_of;         ///< "plain" or "penalised": print the peak memory of one step and end

  [[nodiscard]] bool filtered() const {
    return !models.empty() || !layouts.empty() || !penalties.empty() || !estimators.empty() || !micro_batches.empty() ||
           fused != "both";
  }
  /// The one case that --serve and --memory-of speak of: the first of each list.
  [[nodiscard]] Case single_case() const;
  /// For `rows` rows that are measured together.
  [[nodiscard]] Budget budget(std::size_t rows) const;
};

/// Empty if --help was asked for and printed, or if the request cannot be run; then `exit_code` says which.
[[nodiscard]] std::optional<Options> parse_command_line(int argc, const char* const* argv, int& exit_code);

/// The options that make this program speak of `which` alone; the inverse of single_case().
[[nodiscard]] std::vector<std::string> arguments_of(const Case& which);

}  // namespace overhead
