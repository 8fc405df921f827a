#include "ranks.hpp"

#include <fmt/format.h>
#include <torch/torch.h>

#if defined(MICROREG_WITH_GLOO)
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <microreg/distributed/process_group.hpp>
#endif
#if defined(MICROREG_WITH_MPI)
#include <microreg/distributed/mpi.hpp>
#endif

#include <cstdlib>
#include <string>

namespace cifar {

namespace {

[[maybe_unused]] std::string variable(const char* name) {
  const char* const value = std::getenv(name);
  if (value == nullptr) {
    throw UsageError(fmt::format(
        "--distributed needs the environment variable {}, which torchrun sets: torchrun --no-python --nproc-per-node 2 "
        "microreg_cifar ... --distributed (or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each process)",
        name));
  }
  return value;
}

#if defined(MICROREG_WITH_GLOO)
std::shared_ptr<microreg::Communicator> join_process_group() {
  const int rank = std::stoi(variable("RANK"));
  const int size = std::stoi(variable("WORLD_SIZE"));
  const std::string host = variable("MASTER_ADDR");
  const char* const agent = std::getenv("TORCHELASTIC_USE_AGENT_STORE");
  const char* const restart = std::getenv("TORCHELASTIC_RESTART_COUNT");
  c10d::TCPStoreOptions store_options;
  store_options.port = static_cast<std::uint16_t>(std::stoi(variable("MASTER_PORT")));
  store_options.isServer = rank == 0 && !(agent != nullptr && std::string(agent) == "True");
  store_options.waitWorkers = false;
  store_options.timeout = std::chrono::seconds(60);
  const auto store =
      c10::make_intrusive<c10d::PrefixStore>(fmt::format("microreg_cifar/{}", restart == nullptr ? "0" : restart),
                                             c10::make_intrusive<c10d::TCPStore>(host, store_options));
  auto options = c10d::ProcessGroupGloo::Options::create(std::chrono::seconds(60));
  if (const char* const interface = std::getenv("GLOO_SOCKET_IFNAME")) {
    options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForInterface(interface));
  } else if (host == "localhost" || host == "127.0.0.1") {
    options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1"));
  } else {
    options->devices.push_back(c10d::ProcessGroupGloo::createDefaultDevice());
  }
  auto group = c10::make_intrusive<c10d::ProcessGroup>(store, rank, size);
  group->setBackend(c10::kCPU, c10d::ProcessGroup::BackendType::GLOO,
                    c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, size, options));
  return std::make_shared<microreg::ProcessGroupCommunicator>(group);
}
#endif

}  // namespace

std::shared_ptr<microreg::Communicator> join_ranks(Distributed how) {
  if (how == Distributed::torchrun) {
#if defined(MICROREG_WITH_GLOO)
    return join_process_group();
#else
    throw UsageError("--distributed: this program was built without Gloo; install libgloo-dev and build it again");
#endif
  }
  if (how == Distributed::mpi) {
#if defined(MICROREG_WITH_MPI)
    int provided = 0;
    MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
    return std::make_shared<microreg::MpiCommunicator>();
#else
    throw UsageError(
        "--distributed mpi: this program was built without MPI; install libopenmpi-dev and build it again");
#endif
  }
  return nullptr;
}

void leave_ranks([[maybe_unused]] Distributed how, [[maybe_unused]] int exit_code) {
#if defined(MICROREG_WITH_MPI)
  int initialized = 0;
  MPI_Initialized(&initialized);
  if (how == Distributed::mpi && initialized != 0) {
    exit_code == 1 ? MPI_Abort(MPI_COMM_WORLD, exit_code) : MPI_Finalize();
  }
#endif
}

int local_rank() {
  for (const char* const name : {"LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"}) {
    if (const char* const value = std::getenv(name)) {
      return std::atoi(value);
    }
  }
  return 0;
}

}  // namespace cifar
