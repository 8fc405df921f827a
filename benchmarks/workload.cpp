#include "workload.hpp"

#include <microreg/autocast.hpp>

#include <algorithm>
#include <fstream>
#include <stdexcept>

namespace overhead {

namespace {

std::optional<at::ScalarType> half_type(const std::string& name) {
  if (name == "float32") {
    return std::nullopt;
  }
  return name == "bfloat16" ? at::kBFloat16 : at::kHalf;
}

}  // namespace

Workload make_workload(const Case& which) {
  torch::manual_seed(1);
  Workload workload{
      .model = network(which.model).make(),
      .images = torch::randn({which.batch_size(), 3, 32, 32}),
      .labels = torch::randint(10, {which.batch_size()}, torch::kLong),
      .micro_batch = which.micro_batch,
      .autocast = half_type(which.autocast),
  };
  const torch::Device device(which.device);
  workload.model->to(device);
  workload.images = workload.images.to(device);
  workload.labels = workload.labels.to(device);
  if (which.layout == "channels_last") {
    workload.images = workload.images.contiguous(torch::MemoryFormat::ChannelsLast);
    for (auto& parameter : workload.model->parameters()) {
      if (parameter.dim() == 4) {
        parameter.set_data(parameter.contiguous(torch::MemoryFormat::ChannelsLast));
      }
    }
  }
  return workload;
}

torch::Tensor plain_step(const Workload& workload) {
  workload.model->zero_grad();
  const std::int64_t size = workload.images.size(0);
  torch::Tensor total;
  for (std::int64_t begin = 0; begin < size; begin += workload.micro_batch) {
    const std::int64_t length = std::min(workload.micro_batch, size - begin);
    torch::Tensor loss;
    {
      std::optional<microreg::Autocast> half;
      if (workload.autocast.has_value()) {
        half.emplace(workload.images.device().type(), *workload.autocast);
      }
      const torch::Tensor output = workload.model->forward(workload.images.narrow(0, begin, length));
      loss = torch::cross_entropy_loss(output, workload.labels.narrow(0, begin, length));
    }
    if (length < size) {
      loss = loss * (static_cast<double>(length) / static_cast<double>(size));
    }
    loss.backward();
    total = total.defined() ? total + loss.detach() : loss.detach();
  }
  return total;
}

void synchronise(const Workload& workload) {
  if (workload.images.is_cuda()) {
    torch::cuda::synchronize(workload.images.get_device());
  }
}

void write_state(const Workload& workload, const std::string& file) {
  std::ofstream stream(file, std::ios::binary);
  const auto write = [&](const torch::Tensor& tensor) {
    const torch::Tensor flat = tensor.detach().cpu().contiguous();
    stream.write(static_cast<const char*>(flat.const_data_ptr()), static_cast<std::streamsize>(flat.nbytes()));
  };
  for (const auto& parameter : workload.model->parameters()) {
    write(parameter);
  }
  write(workload.images);
  write(workload.labels);
  if (!stream.flush()) {
    throw std::runtime_error("cannot write " + file);
  }
}

}  // namespace overhead
