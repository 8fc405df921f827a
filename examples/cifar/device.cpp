#include "device.hpp"

#include <ATen/Context.h>
#include <fmt/format.h>

#include <cstdint>

#include "ranks.hpp"

namespace cifar {

torch::Device device_of(const std::string& name) {
  if (name == "auto") {
    return torch::cuda::is_available() ? torch::Device(torch::kCUDA, static_cast<c10::DeviceIndex>(local_rank()))
                                       : torch::Device(torch::kCPU);
  }
  try {
    torch::Device device(name);
    if (device.is_cuda() && device.index() < 0) {
      device = torch::Device(torch::kCUDA, static_cast<c10::DeviceIndex>(local_rank()));
    }
    const auto devices = static_cast<std::int64_t>(torch::cuda::device_count());
    if (!device.is_cpu() && !(device.is_cuda() && device.index() < devices)) {
      throw UsageError(
          fmt::format("--device is {}, but there {}; use cpu or auto", name,
                      torch::cuda::is_available() ? fmt::format("are {} CUDA devices", devices) : "is no CUDA device"));
    }
    return device;
  } catch (const c10::Error& error) {
    throw UsageError(
        fmt::format("--device is {}: {}; use cpu, cuda, cuda:1 or auto", name, error.what_without_backtrace()));
  }
}

void choose_kernels_by_trial(torch::Device device) {
  if (device.is_cuda()) {
    at::globalContext().setBenchmarkCuDNN(true);
  }
}

std::string description(torch::Device device, Layout layout) {
  std::string result = fmt::format("{}, {}", device.str(), name_of(layout_names, layout));
  if (device.is_cuda()) {
    const at::Context& context = at::globalContext();
    const auto precision = [](bool tf32) { return tf32 ? "TF32" : "float32"; };
    result += fmt::format(", convolutions in {}, products in {}{}", precision(context.allowTF32CuDNN()),
                          precision(context.allowTF32CuBLAS()), context.benchmarkCuDNN() ? ", cudnn.benchmark" : "");
  }
  return result;
}

torch::Tensor sent_to(torch::Device device, const torch::Tensor& tensor) {
  return device.is_cuda() ? tensor.pin_memory().to(device, /*non_blocking=*/true) : tensor.to(device);
}

}  // namespace cifar
