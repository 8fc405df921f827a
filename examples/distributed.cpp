// One of several processes that train one network together, on LibTorch's own engine:
//     torchrun --no-python --nproc-per-node 2 build/release/examples/distributed
#include <torch/torch.h>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <microreg/distributed/process_group.hpp>
#include <microreg/microreg.hpp>

#include <cstdio>
#include <cstdlib>
#include <string>

std::string variable(const char* name) { return std::getenv(name) == nullptr ? "" : std::getenv(name); }

c10::intrusive_ptr<c10d::ProcessGroup> join() {
  const int rank = std::stoi(variable("RANK")), size = std::stoi(variable("WORLD_SIZE"));
  c10d::TCPStoreOptions where;
  where.port = static_cast<std::uint16_t>(std::stoi(variable("MASTER_PORT")));
  where.isServer = rank == 0 && variable("TORCHELASTIC_USE_AGENT_STORE") != "True";  // otherwise torchrun is
  where.waitWorkers = false;
  const auto store = c10::make_intrusive<c10d::TCPStore>(variable("MASTER_ADDR"), where);
  auto options = c10d::ProcessGroupGloo::Options::create(std::chrono::seconds(60));
  options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1"));
  auto group = c10::make_intrusive<c10d::ProcessGroup>(store, rank, size);
  group->setBackend(c10::kCPU, c10d::ProcessGroup::BackendType::GLOO,
                    c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, size, options));
  return group;
}

int main() {
  auto ranks = std::make_shared<microreg::ProcessGroupCommunicator>(join());
  microreg::manual_seed(0, *ranks);  // labels, directions and dropout: independent between the ranks
  torch::nn::Sequential model(torch::nn::Linear(8, 16), torch::nn::Tanh(), torch::nn::Linear(16, 3));
  microreg::Regularizer regularizer(model, torch::nn::CrossEntropyLoss(), microreg::FisherTrace{},
                                    {.strength = 0.01, .micro_batch_size = 16, .communicator = ranks});
  torch::optim::SGD optimizer(model->parameters(), 0.5);
  const auto generator = at::detail::createCPUGenerator(1);  // the same data everywhere
  const torch::Tensor images = torch::randn({90, 8}, generator), labels = images.slice(1, 0, 3).argmax(1);
  double first = 0, last = 0;
  for (int step = 0; step < 20; ++step) {
    const auto [begin, size] = microreg::shard(images.size(0), 16, *ranks);  // the part of this rank
    optimizer.zero_grad();
    auto report = regularizer.backward(images.narrow(0, begin, size), labels.narrow(0, begin, size));
    optimizer.step();
    if (step % 19 == 0) {  // the report of all ranks, where it is wanted
      last = microreg::reduced(report, *ranks).loss.item<double>();
      first = step == 0 ? last : first;
    }
  }
  if (ranks->rank() == 0) {
    std::printf("%d ranks: loss %.4f, then %.4f\n", static_cast<int>(ranks->size()), first, last);
  }
  return last < first ? 0 : 1;
}
