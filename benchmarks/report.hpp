/// @file
/// Rows on the screen and in files.
#pragma once

#include "case.hpp"

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

namespace overhead {

struct Row {
  Case which;
  double plain_ms = 0;
  double ratio = 0;
  std::optional<double> peak_memory_ratio;
  std::optional<double> relative_error;  ///< none without a penalty
  std::size_t rounds = 0;
};

/// One point of a sweep. Ratios are medians over rounds, as in Row.
struct SweepRow {
  std::string sweep;  ///< "batch" or "micro_batch": what grows
  Case which;
  double plain_ms = 0;       ///< of a plain step over the mini-batch in the same micro-batches
  double ratio = 0;          ///< penalised over plain
  double relative_time = 0;  ///< penalised over the penalised step of the sweep's first point
  std::optional<double> peak_memory_mb;
  std::size_t rounds = 0;
};

void print_header();
void print_row(const Row& row);
void print_sweep_header(const std::string& title);
void print_sweep_row(const SweepRow& row);

/// Arrays of objects. Throw if the file cannot be written.
void write_json(const std::string& file, const std::vector<Row>& rows, int threads);
void write_json(const std::string& file, const std::vector<SweepRow>& rows, int threads);

}  // namespace overhead
