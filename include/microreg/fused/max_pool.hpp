/// @file
/// Double backward of 2d and 3d max pooling, without the zeros that LibTorch makes for the input's derivative, and in
/// the channels-last layout of 2d without its gather's leaps through memory.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <microreg/detail/libtorch.hpp>
#include <microreg/detail/parallel.hpp>
#include <microreg/fused/rule.hpp>

#include <algorithm>
#include <cstdint>

namespace microreg::inline MICROREG_ABI::detail {

/// out[n, c, o] = v[n, c, indices[n, c, o]], where an index counts the pixels of an image; all channels-last.
template <class T>
void gather_channels_last(const at::Tensor& v, const at::Tensor& indices, at::Tensor& out) {
  const std::int64_t channels = out.size(1);
  const std::int64_t pixels = out.size(2) * out.size(3);
  const std::int64_t image = v.size(2) * v.size(3) * channels;
  const T* const from = values_of<T>(v);
  const std::int64_t* const where = values_of<std::int64_t>(indices);
  T* const to = out.mutable_data_ptr<T>();
  const std::int64_t grain = std::max<std::int64_t>(1, 16384 / channels);
  parallel_for(0, out.size(0) * pixels, grain, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t pixel = begin; pixel < end; ++pixel) {
      const T* const source = from + pixel / pixels * image;
      const std::int64_t offset = pixel * channels;
      for (std::int64_t c = 0; c < channels; ++c) {
        to[offset + c] = source[where[offset + c] * channels + c];
      }
    }
  });
}

/// v at the maxima of the last `dims` dimensions, differentiable.
template <std::int64_t dims>
at::Tensor take_maxima(const at::Tensor& v, const at::Tensor& indices) {
  if (dims == 2 && !at::GradMode::is_enabled() && v.is_cpu() && has_kernels(v.scalar_type()) && indices.dim() == 4 &&
      indices.is_contiguous(at::MemoryFormat::ChannelsLast) && !indices.is_contiguous()) {  // one pixel is both
    const at::Tensor from = v.contiguous(at::MemoryFormat::ChannelsLast);
    at::Tensor out = at::empty_like(indices, v.options());
    with_type(v.scalar_type(), [&](auto zero) { gather_channels_last<decltype(zero)>(from, indices, out); });
    return out;
  }
  return v.flatten(-dims).gather(-1, indices.flatten(-dims)).view_as(indices);
}

/// Max pooling's backward puts dy where the maxima were; its own backward takes what comes in from there. It does not
/// depend on x.
template <std::int64_t dims>
Tensors max_pool_derivative(const Call& call, const Tensors& upstream, OutputMask needs) {
  return {needs[0] ? take_maxima<dims>(upstream[0], call.tensor(7)) : at::Tensor(), at::Tensor()};
}

inline constexpr Rule max_pool2d_backward_rule{
    .schema =
        "aten::max_pool2d_with_indices_backward(Tensor grad_output, Tensor self, int[2] kernel_size, int[2] stride, "
        "int[2] padding, int[2] dilation, bool ceil_mode, Tensor indices) -> Tensor",
    .inputs = {0, 1},
    .saved = {7},
    .derivative = max_pool_derivative<2>};

inline constexpr Rule max_pool3d_backward_rule{
    .schema =
        "aten::max_pool3d_with_indices_backward(Tensor grad_output, Tensor self, int[3] kernel_size, int[3] stride, "
        "int[3] padding, int[3] dilation, bool ceil_mode, Tensor indices) -> Tensor",
    .inputs = {0, 1},
    .saved = {7},
    .derivative = max_pool_derivative<3>};

}  // namespace microreg::inline MICROREG_ABI::detail
