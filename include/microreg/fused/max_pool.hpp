/// @file
/// Double backward of 2d max pooling in the channels-last layout, where LibTorch's gather leaps through memory. In the
/// contiguous layout that gather costs nothing worth the trouble, and stays.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <microreg/fused/interception.hpp>

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

/// Max pooling's backward puts dy where the maxima were; its own backward takes what comes in from there. It does not
/// depend on x.
struct MaxPoolBackward : torch::autograd::Function<MaxPoolBackward> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& dy, const at::Tensor& x,
                            const at::Tensor& indices, const std::vector<std::int64_t>& kernel_size,
                            const std::vector<std::int64_t>& stride, const std::vector<std::int64_t>& padding,
                            const std::vector<std::int64_t>& dilation, bool ceil_mode) {
    context->save_for_backward({indices});
    context->set_materialize_grads(false);
    return at::max_pool2d_with_indices_backward(dy, x, kernel_size, stride, padding, dilation, ceil_mode, indices);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list upstream) {
    const at::Tensor& v = upstream[0];
    at::Tensor d_dy;
    if (v.defined() && context->needs_input_grad(0)) {
      const at::Tensor indices = context->get_saved_variables()[0];
      if (at::GradMode::is_enabled()) {
        d_dy = v.flatten(2).gather(2, indices.flatten(2)).view_as(indices);
      } else {
        const at::Tensor from = v.contiguous(at::MemoryFormat::ChannelsLast);
        d_dy = at::empty_like(indices, v.options());
        v.scalar_type() == at::kDouble ? gather_channels_last<double>(from, indices, d_dy)
                                       : gather_channels_last<float>(from, indices, d_dy);
      }
    }
    return {d_dy, {}, {}, {}, {}, {}, {}, {}};
  }
};

inline at::Tensor max_pool2d_backward_kernel(const at::Tensor& dy, const at::Tensor& x, at::IntArrayRef kernel_size,
                                             at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                             bool ceil_mode, const at::Tensor& indices) {
  const StockKernels stock;
  const bool channels_last = indices.dim() == 4 && indices.is_contiguous(at::MemoryFormat::ChannelsLast) &&
                             !indices.is_contiguous();  // a map of one pixel is both
  if (!channels_last || !x.is_cpu() || !should_fuse({dy, x})) {
    return at::max_pool2d_with_indices_backward(dy, x, kernel_size, stride, padding, dilation, ceil_mode, indices);
  }
  return MaxPoolBackward::apply(dy, x, indices, kernel_size.vec(), stride.vec(), padding.vec(), dilation.vec(),
                                ceil_mode);
}

}  // namespace microreg::detail
