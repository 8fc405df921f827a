/// @file
/// The thread in which LibTorch runs backward passes on a device.
#pragma once

#include <ATen/ATen.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/autograd.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/graph_node.hpp>

#include <cstdint>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// The number that LibTorch gives the thread in which its engine runs nodes on `device`: one of the engine's own for a
/// GPU, the same as long as the process lives; for the CPU the calling thread. Nodes that a backward pass makes there
/// bear it (Node::thread_id). Asks the engine, without waiting for the device.
inline std::uint64_t engine_thread(c10::Device device) {
  std::uint64_t result = 0;
  const at::Tensor scalar = at::zeros({}, at::TensorOptions(device));
  set_derivative(scalar, {}, "microreg::EngineThread", [&](const at::Tensor& /*one*/) {
    result = at::RecordFunction::currentThreadId();
    return std::vector<at::Tensor>();
  });
  torch::autograd::backward({scalar}, {at::zeros_like(scalar)});
  return result;
}

}  // namespace microreg::inline MICROREG_ABI::detail
