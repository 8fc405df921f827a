/// @file
/// The rows of the table and the points of the sweeps.
#pragma once

#include "memory.hpp"
#include "plan.hpp"
#include "report.hpp"

#include <vector>

namespace overhead {

/// Accuracy, time and memory of cases that share a workload.
[[nodiscard]] std::vector<Row> measure_group(const Group& group, const Budget& budget, MemoryMeter* memory);

/// Time and memory of a mini-batch as |B| grows at fixed |M|: time should grow in proportion, memory not at all.
[[nodiscard]] std::vector<SweepRow> sweep_batch(const Case& common, const Budget& budget, MemoryMeter* memory);

/// The same as |M| grows at fixed |B|.
[[nodiscard]] std::vector<SweepRow> sweep_micro_batch(const Case& common, const Budget& budget, MemoryMeter* memory);

/// The same as a smaller share of eight micro-batches is penalised.
[[nodiscard]] std::vector<SweepRow> sweep_share(const Case& common, const Budget& budget, MemoryMeter* memory);

}  // namespace overhead
