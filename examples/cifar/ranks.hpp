/// @file
/// Several processes as the ranks of one run: who they are, as torchrun or mpirun says it.
#pragma once

#include "options.hpp"

#include <microreg/distributed/communicator.hpp>

#include <memory>

namespace cifar {

/// Joins the ranks of this run; null for Distributed::none. Throws UsageError where the launcher's environment is not
/// there, or this program was built without the engine.
[[nodiscard]] std::shared_ptr<microreg::Communicator> join_ranks(Distributed how);

/// To be called at the end, with the exit code. Of a run under MPI that failed it ends all ranks, and does not return.
void leave_ranks(Distributed how, int exit_code);

/// The device for --device auto and cuda: each rank of a machine takes its own.
[[nodiscard]] int local_rank();

}  // namespace cifar
