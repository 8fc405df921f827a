/// @file
/// The device that --device names.
#pragma once

#include <torch/torch.h>

#include <string>

namespace cifar {

/// The CPU, or a CUDA device with its index. Throws UsageError, with the remedy, if there is no such device.
[[nodiscard]] torch::Device device_of(const std::string& name);

}  // namespace cifar
