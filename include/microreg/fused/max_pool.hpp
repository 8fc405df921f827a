/// @file
/// Double backward of 2d and 3d max pooling, without the zeros that LibTorch makes for the input's derivative, and in
/// the channels-last layout of 2d without its gather's leaps through memory.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <microreg/detail/interception.hpp>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace microreg::detail {

/// out[n, c, o] = v[n, c, indices[n, c, o]], where an index counts the pixels of an image; all channels-last.
template <class T>
void gather_channels_last(const at::Tensor& v, const at::Tensor& indices, at::Tensor& out) {
  const std::int64_t channels = out.size(1);
  const std::int64_t pixels = out.size(2) * out.size(3);
  const std::int64_t image = v.size(2) * v.size(3) * channels;
  const T* const from = v.const_data_ptr<T>();
  const std::int64_t* const where = indices.const_data_ptr<std::int64_t>();
  T* const to = out.mutable_data_ptr<T>();
  const std::int64_t grain = std::max<std::int64_t>(1, 16384 / channels);
  at::parallel_for(0, out.size(0) * pixels, grain, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t pixel = begin; pixel < end; ++pixel) {
      const T* const source = from + pixel / pixels * image;
      const std::int64_t offset = pixel * channels;
      for (std::int64_t c = 0; c < channels; ++c) {
        to[offset + c] = source[where[offset + c] * channels + c];
      }
    }
  });
}

/// v at the maxima, differentiable.
template <std::int64_t dims>
at::Tensor take_maxima(const at::Tensor& v, const at::Tensor& indices) {
  if (dims == 2 && !at::GradMode::is_enabled() && v.is_cpu() && indices.dim() == 4 &&
      indices.is_contiguous(at::MemoryFormat::ChannelsLast) && !indices.is_contiguous()) {  // one pixel is both
    const at::Tensor from = v.contiguous(at::MemoryFormat::ChannelsLast);
    at::Tensor out = at::empty_like(indices, v.options());
    v.scalar_type() == at::kDouble ? gather_channels_last<double>(from, indices, out)
                                   : gather_channels_last<float>(from, indices, out);
    return out;
  }
  return v.flatten(-dims).gather(-1, indices.flatten(-dims)).view_as(indices);
}

/// What 2d and 3d max pooling's backward have in common.
struct MaxPoolGeometry {
  std::vector<std::int64_t> kernel_size, stride, padding, dilation;
  bool ceil_mode;

  template <std::int64_t dims>
  [[nodiscard]] at::Tensor backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& indices) const {
    if constexpr (dims == 2) {
      return at::max_pool2d_with_indices_backward(dy, x, kernel_size, stride, padding, dilation, ceil_mode, indices);
    } else {
      return at::max_pool3d_with_indices_backward(dy, x, kernel_size, stride, padding, dilation, ceil_mode, indices);
    }
  }
};

/// Max pooling's backward puts dy where the maxima were; its own backward takes what comes in from there. It does not
/// depend on x.
template <std::int64_t dims>
struct MaxPoolBackward : torch::autograd::Function<MaxPoolBackward<dims>> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& dy, const at::Tensor& x,
                            const at::Tensor& indices, const MaxPoolGeometry& geometry) {
    context->save_for_backward({indices});
    context->set_materialize_grads(false);
    return geometry.backward<dims>(dy, x, indices);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& upstream) {
    const at::Tensor& v = upstream[0];
    const bool wanted = v.defined() && context->needs_input_grad(0);
    return {wanted ? take_maxima<dims>(v, context->get_saved_variables()[0]) : at::Tensor(), {}, {}, {}};
  }
};

template <std::int64_t dims>
at::Tensor max_pool_backward_kernel(const at::Tensor& dy, const at::Tensor& x, at::IntArrayRef kernel_size,
                                    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                    bool ceil_mode, const at::Tensor& indices) {
  const StockKernels stock;
  const MaxPoolGeometry geometry{kernel_size.vec(), stride.vec(), padding.vec(), dilation.vec(), ceil_mode};
  return should_fuse({dy, x}) ? MaxPoolBackward<dims>::apply(dy, x, indices, geometry)
                              : geometry.backward<dims>(dy, x, indices);
}

}  // namespace microreg::detail
