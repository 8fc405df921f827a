/// @file
/// The weight gradient of 2d convolutions of many channels on small maps, as one matrix product.
///
/// With few pixels, oneDNN's kernel spends its time on the weights, and takes several times as long as the convolution
/// itself. The patches of all images as rows of a matrix, a copy at most twice as large as the weights, make it one
/// product instead.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <microreg/detail/plain_tensors.hpp>

#include <array>
#include <cstdint>

namespace microreg::inline MICROREG_ABI::detail {

/// Stride, padding and dilation of a 2d convolution in one group, by height and width.
struct PatchGeometry {
  std::array<std::int64_t, 2> stride, padding, dilation;
};

/// Whether weight_gradient_by_product() is faster than LibTorch for a convolution that is not transposed; measured on
/// kernels of 3x3 in float32. The last condition bounds the copy.
inline bool prefers_product(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight) {
  if (at::GradMode::is_enabled() || weight.dim() != 4 || input.dim() != 4 || grad_output.dim() != 4 ||
      !weight.is_cpu() || weight.scalar_type() != at::kFloat || input.scalar_type() != at::kFloat ||
      grad_output.scalar_type() != at::kFloat || !is_plain(weight) || !is_plain(input) || !is_plain(grad_output) ||
      is_transformed()) {
    return false;
  }
  constexpr std::int64_t few_pixels = 16;
  constexpr std::int64_t many_channels = 64;
  const std::int64_t pixels = grad_output.size(2) * grad_output.size(3);
  return pixels > 0 && pixels <= few_pixels && weight.size(0) >= many_channels && weight.size(1) >= many_channels &&
         weight.size(1) == input.size(1) &&  // one group
         pixels * grad_output.size(0) <= 2 * weight.size(0);
}

/// dW[k, c, i, j] = sum over n, p, q of grad_output[n, k, p, q] * input[n, c, p stride + i dilation - padding, ...], in
/// the layout of `weight`.
inline at::Tensor weight_gradient_by_product(const at::Tensor& grad_output, const at::Tensor& input,
                                             const at::Tensor& weight, const PatchGeometry& geometry) {
  const auto& [stride, padding, dilation] = geometry;
  const std::int64_t out = weight.size(0), in = weight.size(1), height = weight.size(2), width = weight.size(3);
  const std::int64_t rows = grad_output.size(0) * grad_output.size(2) * grad_output.size(3);
  const at::Tensor padded = at::constant_pad_nd(input, {padding[1], padding[1], padding[0], padding[0]})
                                .contiguous(at::MemoryFormat::ChannelsLast)
                                .permute({0, 2, 3, 1});
  const at::Tensor patches =
      padded
          .as_strided({input.size(0), grad_output.size(2), grad_output.size(3), height, width, in},
                      {padded.stride(0), padded.stride(1) * stride[0], padded.stride(2) * stride[1],
                       padded.stride(1) * dilation[0], padded.stride(2) * dilation[1], padded.stride(3)})
          .reshape({rows, height * width * in});
  return at::mm(grad_output.permute({0, 2, 3, 1}).reshape({rows, out}).t(), patches)
      .view({out, height, width, in})
      .permute({0, 3, 1, 2})
      .contiguous(weight.suggest_memory_format());
}

}  // namespace microreg::inline MICROREG_ABI::detail
