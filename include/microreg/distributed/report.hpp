/// @file
/// The report of a step that several ranks took together.
#pragma once

#include <microreg/distributed/communicator.hpp>
#include <microreg/report.hpp>

namespace microreg::inline MICROREG_ABI {

/// What one process would have reported of the whole mini-batch, from the report that each rank has of its own
/// micro-batches: loss, penalties, micro-batch losses and norms in the order of the ranks. `gradient_norm` and
/// `gradient_ratio` are of the whole step already, outputs stay this rank's.
///
/// A collective: to be called on every rank, where the numbers are wanted, and not in each step. On a rank without a
/// sample `loss_parts` has each number by itself. Waits for a CUDA device.
///
/// ```cpp
/// last = microreg::reduced(report, *ranks).loss.item<double>();
/// ```
[[nodiscard]] Report reduced(const Report& report, Communicator& communicator);

}  // namespace microreg::inline MICROREG_ABI

#if !defined(MICROREG_COMPILED)
#include <microreg/definitions/distributed.hpp>
#endif
