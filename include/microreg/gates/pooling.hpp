/// @file
/// Max pooling, adaptive and fractional max pooling: the elements that the first pass took. The one-dimensional forms
/// are two-dimensional ones to LibTorch.
#pragma once

#include <ATen/ATen.h>
#include <microreg/detail/tensors.hpp>
#include <microreg/gates/history.hpp>
#include <microreg/gates/kinked_operation.hpp>

#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail::gating {

/// `self` at flat positions within its last dimensions, in the memory layout of the positions.
inline at::Tensor gather_flat(const at::Tensor& self, const at::Tensor& indices, std::int64_t dimensions) {
  const at::MemoryFormat format = indices.suggest_memory_format();
  at::Tensor result = at::empty(indices.sizes(), self.options(), format);
  const auto flat = [&](const at::Tensor& tensor) {
    return format == at::MemoryFormat::Contiguous ? tensor.flatten(-dimensions) : tensor.movedim(1, -1).flatten(1, -2);
  };
  at::Tensor there = flat(result);
  at::gather_out(there, flat(self), format == at::MemoryFormat::Contiguous ? -1 : 1, flat(indices));
  return result;
}

/// LibTorch's gradient of a pooling: (upstream, self, as many of the forward's further arguments as it takes, indices).
inline at::Tensor pooling_backward(const at::Tensor& upstream, const Arguments& in, const at::Tensor& self,
                                   const at::Tensor& indices) {
  const auto backward =
      c10::Dispatcher::singleton().findSchemaOrThrow(c10::str("aten::", in.operation(), "_backward").c_str(), "");
  torch::jit::Stack stack{upstream, self};
  const auto further = static_cast<std::ptrdiff_t>(backward.schema().arguments().size()) - 3;
  stack.insert(stack.end(), in.values().begin() + 1, in.values().begin() + 1 + further);
  stack.emplace_back(indices);
  backward.callBoxed(stack);
  return stack.front().toTensor();
}

inline GateTensors gates_of_pooling(const Arguments& /*in*/, const std::vector<c10::IValue>& results) {
  return {results[1].toTensor()};
}
inline Tensors replay_pooling(const Arguments& in, const GateTensors& gates) {
  const at::Tensor self = in.tensor(0).detach();
  const at::Tensor result =
      gather_flat(self, gates[0], std::string_view(in.operation()).find("3d") == std::string_view::npos ? 2 : 3);
  set_gradient(result, in.tensor(0), [in = in.without_operand(), self, indices = gates[0]](const at::Tensor& upstream) {
    return pooling_backward(upstream, in, self, indices);
  });
  return {result, gates[0]};
}

// The schemas of each and of its backward pass, whichever the number of dimensions.

inline constexpr char windows[] =
    "Tensor self, int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode -> Tensor, Tensor";
inline constexpr char windows_backward[] =
    "Tensor grad_output, Tensor self, int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode, "
    "Tensor indices";
inline constexpr char adaptive[] = "Tensor self, int[] output_size -> Tensor, Tensor";
inline constexpr char adaptive_backward[] = "Tensor grad_output, Tensor self, Tensor indices";
inline constexpr char fractional[] =
    "Tensor self, int[] kernel_size, int[] output_size, Tensor random_samples -> Tensor, Tensor";
inline constexpr char fractional_backward[] =
    "Tensor grad_output, Tensor self, int[] kernel_size, int[] output_size, Tensor indices";

constexpr KinkedOperation pooling(const char* operation, const char* schema, const char* backward) {
  return {operation, schema, nullptr, gates_of_pooling, replay_pooling, nullptr, backward};
}

inline constexpr KinkedOperation poolings[] = {
    pooling("max_pool2d_with_indices", windows, windows_backward),
    pooling("max_pool3d_with_indices", windows, windows_backward),
    pooling("adaptive_max_pool2d", adaptive, adaptive_backward),
    pooling("adaptive_max_pool3d", adaptive, adaptive_backward),
    pooling("fractional_max_pool2d", fractional, fractional_backward),
    pooling("fractional_max_pool3d", fractional, fractional_backward),
};

inline constexpr char max_pool1d_schema[] =
    "Tensor self, int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode";

/// Without a gradient LibTorch's max_pool1d takes a way without indices: here it takes the other, so that every call
/// has its gate.
inline void max_pool1d(InterceptedCall& call) {
  const Arguments& in = call.in;
  call.give({std::get<0>(at::max_pool1d_with_indices(in.tensor(0), in.integers(1), in.integers(2), in.integers(3),
                                                     in.integers(4), in.flag(5)))});
}

}  // namespace microreg::inline MICROREG_ABI::detail::gating
