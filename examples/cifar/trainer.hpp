/// @file
/// A training run from options to records.
#pragma once

#include "options.hpp"
#include "progress.hpp"
#include "records.hpp"

#include <microreg/distributed/communicator.hpp>

#include <memory>

namespace cifar {

/// Trains as `options` say and returns what came out, which is also in the records.
///
/// SIGINT and SIGTERM let it finish the step, save a checkpoint and return a summary with status "interrupted".
///
/// Throws UsageError, DataError, CheckpointError, std::runtime_error if a record cannot be written, and
/// microreg::NonFiniteError if the run diverges: by then the summary is written with status "diverged".
///
/// Of several `ranks` each takes its part of every mini-batch, and rank 0 alone prints and writes.
Summary train(const Options& options, Progress& progress,
              const std::shared_ptr<microreg::Communicator>& ranks = nullptr);

}  // namespace cifar
