/// @file
/// The device that --device names, and how a run computes there.
#pragma once

#include <torch/torch.h>

#include <string>

#include "options.hpp"

namespace cifar {

/// The CPU, or a CUDA device with its index. Throws UsageError, with the remedy, if there is no such device.
[[nodiscard]] torch::Device device_of(const std::string& name);

/// On CUDA: lets cuDNN try its kernels on the first batch of each shape and keep the fastest (cudnn.benchmark). Double
/// backward meets shapes that its rules of thumb were not made for.
void choose_kernels_by_trial(torch::Device device);

/// "cpu, contiguous" or "cuda:0, channels-last, convolutions in TF32, products in float32, cudnn.benchmark".
[[nodiscard]] std::string description(torch::Device device, Layout layout);

/// `tensor`, which is on the CPU, on the device. To CUDA it goes from pinned memory, and the host does not wait.
[[nodiscard]] torch::Tensor sent_to(torch::Device device, const torch::Tensor& tensor);

}  // namespace cifar
