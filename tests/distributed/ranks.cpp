// One of several processes. What it is to do, and over what:
//     ranks gloo STORE equal|kill|hang|throw      with RANK and WORLD_SIZE in the environment, STORE a file they share
//     mpirun -np 2 ranks mpi - equal|hang|throw
// Exits with 0 where what had to happen has happened.
#include <torch/torch.h>
#include <microreg/distributed/report.hpp>
#include <microreg/microreg.hpp>
#include <torch/csrc/distributed/c10d/FileStore.hpp>
#if defined(MICROREG_WITH_GLOO)
#include <microreg/distributed/process_group.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#endif
#if defined(MICROREG_WITH_MPI)
#include <microreg/distributed/mpi.hpp>
#endif

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

namespace {

using Ranks = std::shared_ptr<microreg::Communicator>;
using microreg::GradientNorm;

void require(bool condition, const std::string& what) {
  if (!condition) {
    throw std::logic_error(what);
  }
}

Ranks join([[maybe_unused]] const std::string& engine, [[maybe_unused]] const std::string& store_file) {
#if defined(MICROREG_WITH_MPI)
  if (engine == "mpi") {
    MPI_Init(nullptr, nullptr);
    return std::make_shared<microreg::MpiCommunicator>();
  }
#endif
#if defined(MICROREG_WITH_GLOO)
  if (engine == "gloo") {
    const int rank = std::atoi(std::getenv("RANK")), size = std::atoi(std::getenv("WORLD_SIZE"));
    const auto store = c10::make_intrusive<c10d::FileStore>(store_file, size);
    auto options = c10d::ProcessGroupGloo::Options::create(std::chrono::seconds(60));
    options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1"));
    auto group = c10::make_intrusive<c10d::ProcessGroup>(store, rank, size);
    group->setBackend(c10::kCPU, c10d::ProcessGroup::BackendType::GLOO,
                      c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, size, options));
    return std::make_shared<microreg::ProcessGroupCommunicator>(group);
  }
#endif
  throw std::logic_error("built without " + engine);
}

struct NetImpl : torch::nn::Module {
  explicit NetImpl(double dropout) : drop(dropout) {
    register_module("a", a);
    register_module("drop", drop);
    register_module("b", b);
    to(torch::kFloat64);
  }
  torch::Tensor forward(const torch::Tensor& x) { return b(drop(torch::tanh(a(x)))); }
  torch::nn::Linear a{6, 7};
  torch::nn::Dropout drop;
  torch::nn::Linear b{7, 5};
};
TORCH_MODULE(Net);

torch::Tensor grad_of(const Net& net) {
  std::vector<torch::Tensor> parts;
  for (const torch::Tensor& parameter : net->parameters()) {
    parts.push_back(parameter.grad().flatten());
  }
  return torch::cat(parts);
}

/// All samples, the same on every rank, and where this rank's begin: ragged shards, the last rank with none.
struct Data {
  torch::Tensor x, y;
  std::int64_t begin, size;
};
Data data_of(const Ranks& ranks) {
  const std::int64_t sizes[] = {9, 6, 2, 0};
  std::int64_t begin = 0, all = 0;
  for (std::int64_t r = 0; r < ranks->size(); ++r) {
    begin += r < ranks->rank() ? sizes[r % 4] : 0;
    all += sizes[r % 4];
  }
  const auto generator = at::detail::createCPUGenerator(3);
  return {torch::randn({all, 6}, generator, torch::kFloat64), torch::randint(0, 5, {all}, generator, torch::kInt64),
          begin, sizes[ranks->rank() % 4]};
}

void equal(const Ranks& ranks) {
  const Data data = data_of(ranks);
  const auto step = [&](const auto& penalty, double dropout, std::uint64_t seed) {
    torch::manual_seed(1 + static_cast<std::uint64_t>(ranks->rank()));  // other weights on each rank, which do not stay
    Net net(dropout);
    microreg::manual_seed(seed, *ranks);
    microreg::Regularizer<> regularizer(net, torch::nn::CrossEntropyLoss(), penalty,
                                        {.strength = 0.2, .micro_batch_size = 4, .communicator = ranks});
    regularizer.backward(data.x.narrow(0, data.begin, data.size), data.y.narrow(0, data.begin, data.size));
    return grad_of(net);
  };
  const torch::Tensor grad = step(GradientNorm{}, 0, 0);

  torch::manual_seed(1);
  Net net(0);
  torch::Tensor objective = torch::zeros({}, torch::kFloat64);
  const std::int64_t sizes[] = {9, 6, 2, 0};
  std::int64_t begin = 0;
  for (std::int64_t r = 0; r < ranks->size(); ++r) {
    for (std::int64_t i = 0; i < sizes[r]; i += 4) {
      const std::int64_t size = std::min<std::int64_t>(4, sizes[r] - i);
      const auto loss = torch::nn::functional::cross_entropy(net->forward(data.x.narrow(0, begin + i, size)),
                                                             data.y.narrow(0, begin + i, size));
      torch::Tensor squares = torch::zeros({}, torch::kFloat64);
      for (const auto& g : torch::autograd::grad({loss}, net->parameters(), {}, true, true)) {
        squares = squares + g.square().sum();
      }
      objective = objective + static_cast<double>(size) / static_cast<double>(data.x.size(0)) * (loss + 0.2 * squares);
    }
    begin += sizes[r];
  }
  objective.backward();
  const double error = ((grad - grad_of(net)).norm() / grad.norm()).item<double>();
  require(error < 1e-12, "off the textbook by " + std::to_string(error));
  const torch::Tensor first = grad.clone();
  ranks->broadcast(first, 0);
  require(torch::equal(grad, first), "not the bits of rank 0");

  // Labels and dropout: a function of the seed.
  const auto drawn = microreg::FisherTrace{};
  require(torch::equal(step(drawn, 0.5, 1), step(drawn, 0.5, 1)), "the same seed, other labels or dropout");
  require(!torch::equal(step(drawn, 0.5, 1), step(drawn, 0.5, 2)), "another seed, the same labels and dropout");
}

/// In step 3 something happens to rank 1; the others have to throw, with their gradients as they were.
void fail(const Ranks& ranks, const std::string& mode) {
  const Data data = data_of(ranks);
  Net net(0);
  int calls = 0;
  const auto loss = [&](const torch::Tensor& output, const torch::Tensor& target) {
    if (ranks->rank() == 1 && ++calls > 6) {  // two micro-batches a step
      if (mode == "kill") {
        std::raise(SIGKILL);
      } else if (mode == "hang") {
        std::raise(SIGSTOP);
      }
      throw std::runtime_error("the disk is full");
    }
    return torch::nn::functional::cross_entropy(output, target);
  };
  microreg::Regularizer<> regularizer(net, loss, GradientNorm{}, {.micro_batch_size = 4, .communicator = ranks});
  torch::Tensor before;
  const auto start = std::chrono::steady_clock::now();
  std::string message;
  try {
    for (int step = 0; step < 5; ++step) {
      regularizer.backward(data.x.narrow(0, data.begin, data.size), data.y.narrow(0, data.begin, data.size));
      before = grad_of(net).clone();
    }
  } catch (const std::exception& error) {
    message = error.what();
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("rank %d after %.1f s: %s\n", static_cast<int>(ranks->rank()), seconds, message.c_str());
  std::fflush(stdout);
  const auto has = [&](const char* words) { return message.find(words) != std::string::npos; };
  require(seconds < 30, "it took longer than 30 s");
  require(regularizer.step() == 3, "another step was to fail");
  require(torch::equal(before, grad_of(net)), ".grad has changed");
  if (mode == "throw") {
    require(has("the disk is full"), "the message is not the one of rank 1");
  }
  require(ranks->rank() == 1 || (has("rank 1") && has("step 3")), "the message does not name rank and step");
}

}  // namespace

int main(int argc, char** argv) {
  try {
    require(argc == 4, "three arguments");
    const std::string engine = argv[1], mode = argv[3];
    const Ranks ranks = join(engine, argv[2]);
    torch::set_num_threads(1);
    mode == "equal" ? equal(ranks) : fail(ranks, mode);
    std::printf("rank %d of %d: as it should be\n", static_cast<int>(ranks->rank()), static_cast<int>(ranks->size()));
    std::fflush(stdout);
#if defined(MICROREG_WITH_MPI)
    if (engine == "mpi" && mode != "hang") {
      MPI_Finalize();
    }
#endif
    std::_Exit(0);  // a hung rank is waited for by nobody
  } catch (const std::exception& error) {
    std::printf("error: %s\n", error.what());
    std::fflush(stdout);
    std::_Exit(1);
  }
}
