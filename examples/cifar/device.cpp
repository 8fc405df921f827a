#include "device.hpp"

#include <fmt/format.h>

#include <cstdint>

#include "options.hpp"
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

}  // namespace cifar
