/// @file
/// The three gradients of a backward operation, of which a mask says which ones were asked for. An autograd Function
/// may not return undefined tensors, so a node returns only those, and they are spread out again behind it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/autograd/variable.h>

#include <array>
#include <cstdint>
#include <tuple>
#include <utility>

namespace microreg::detail {

using OutputMask = std::array<bool, 3>;
using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

inline std::int64_t pack(OutputMask mask) { return (mask[0] ? 1 : 0) | (mask[1] ? 2 : 0) | (mask[2] ? 4 : 0); }
inline OutputMask unpack(const c10::IValue& value) {
  const std::int64_t bits = value.toInt();
  return {(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0};
}

/// The tensors that `mask` asks for, in order.
inline torch::autograd::variable_list gather(OutputMask mask, std::array<at::Tensor, 3> tensors) {
  torch::autograd::variable_list result;
  for (std::size_t i = 0; i < 3; ++i) {
    if (mask[i]) {
      result.push_back(std::move(tensors[i]));
    }
  }
  return result;
}

/// The inverse of gather(): undefined where `mask` did not ask.
inline ThreeTensors spread(OutputMask mask, torch::autograd::variable_list tensors) {
  std::array<at::Tensor, 3> result;
  for (std::size_t i = 0, next = 0; i < 3; ++i) {
    if (mask[i]) {
      result[i] = std::move(tensors[next++]);
    }
  }
  return {std::move(result[0]), std::move(result[1]), std::move(result[2])};
}

}  // namespace microreg::detail
