/// @file
/// Max pooling, adaptive and fractional max pooling: the elements that the first pass took. The one-dimensional forms
/// are two-dimensional ones to LibTorch.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <microreg/gates/kernel.hpp>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

namespace microreg::detail {

/// Which pooling LibTorch's backward has to undo, and with which arguments.
struct Pooling {
  enum Kind : std::int64_t { max, adaptive, fractional };

  Kind kind;
  std::int64_t dimensions;  // 2 or 3
  std::vector<std::int64_t> kernel_size{};
  std::vector<std::int64_t> stride{};
  std::vector<std::int64_t> padding{};
  std::vector<std::int64_t> dilation{};
  bool ceil_mode = false;
  std::vector<std::int64_t> output_size{};

  [[nodiscard]] at::Tensor backward(const at::Tensor& grad_output, const at::Tensor& self,
                                    const at::Tensor& indices) const {
    const bool plane = dimensions == 2;
    switch (kind) {
      case adaptive:
        return plane ? at::adaptive_max_pool2d_backward(grad_output, self, indices)
                     : at::adaptive_max_pool3d_backward(grad_output, self, indices);
      case fractional:
        return plane ? at::fractional_max_pool2d_backward(grad_output, self, kernel_size, output_size, indices)
                     : at::fractional_max_pool3d_backward(grad_output, self, kernel_size, output_size, indices);
      default:
        return plane ? at::max_pool2d_with_indices_backward(grad_output, self, kernel_size, stride, padding, dilation,
                                                            ceil_mode, indices)
                     : at::max_pool3d_with_indices_backward(grad_output, self, kernel_size, stride, padding, dilation,
                                                            ceil_mode, indices);
    }
  }

  using SavedData = ska::flat_hash_map<std::string, c10::IValue>;

  void save(SavedData& into) const {
    into["kind"] = static_cast<std::int64_t>(kind);
    into["dimensions"] = dimensions;
    into["kernel_size"] = kernel_size;
    into["stride"] = stride;
    into["padding"] = padding;
    into["dilation"] = dilation;
    into["ceil_mode"] = ceil_mode;
    into["output_size"] = output_size;
  }
  static Pooling restore(SavedData& from) {
    return {.kind = static_cast<Kind>(from["kind"].toInt()),
            .dimensions = from["dimensions"].toInt(),
            .kernel_size = from["kernel_size"].toIntVector(),
            .stride = from["stride"].toIntVector(),
            .padding = from["padding"].toIntVector(),
            .dilation = from["dilation"].toIntVector(),
            .ceil_mode = from["ceil_mode"].toBool(),
            .output_size = from["output_size"].toIntVector()};
  }
};

/// `self` at flat positions within its last `dimensions` dimensions, in the memory layout of the positions.
inline at::Tensor gather_flat(const at::Tensor& self, const at::Tensor& indices, std::int64_t dimensions) {
  if (indices.suggest_memory_format() != at::MemoryFormat::Contiguous) {
    const at::Tensor last = indices.movedim(1, -1);
    return self.movedim(1, -1).flatten(1, -2).gather(1, last.flatten(1, -2)).view(last.sizes()).movedim(-1, 1);
  }
  return self.flatten(-dimensions).gather(-1, indices.flatten(-dimensions)).view(indices.sizes());
}

/// Max pooling at given indices, whose gradient is LibTorch's.
struct ReplayPooling : torch::autograd::Function<ReplayPooling> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& self,
                            const at::Tensor& indices, const Pooling& pooling) {
    context->save_for_backward({self, indices});
    pooling.save(context->saved_data);
    return gather_flat(self, indices, pooling.dimensions);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list upstream) {
    const auto saved = context->get_saved_variables();
    return {Pooling::restore(context->saved_data).backward(upstream[0], saved[0], saved[1]), at::Tensor(),
            at::Tensor()};
  }
};

using TwoTensors = std::tuple<at::Tensor, at::Tensor>;

template <typename Stock>
TwoTensors pooling_kernel(const char* operation, const at::Tensor& self, const Pooling& pooling, const Stock& stock) {
  return gated(
      operation, {&self}, stock, [](const TwoTensors& result) { return Gates{std::get<1>(result)}; },
      [&](const Gates& gates) { return TwoTensors{ReplayPooling::apply(self, gates[0], pooling), gates[0]}; });
}

inline TwoTensors max_pool2d_kernel(const at::Tensor& self, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                    at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  return pooling_kernel(
      "max_pool2d_with_indices", self,
      {Pooling::max, 2, kernel_size.vec(), stride.vec(), padding.vec(), dilation.vec(), ceil_mode},
      [&] { return at::max_pool2d_with_indices(self, kernel_size, stride, padding, dilation, ceil_mode); });
}

inline TwoTensors max_pool3d_kernel(const at::Tensor& self, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                    at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  return pooling_kernel(
      "max_pool3d_with_indices", self,
      {Pooling::max, 3, kernel_size.vec(), stride.vec(), padding.vec(), dilation.vec(), ceil_mode},
      [&] { return at::max_pool3d_with_indices(self, kernel_size, stride, padding, dilation, ceil_mode); });
}

/// Without a gradient LibTorch takes a way without indices: here it takes the other, so that every call has its gate.
inline at::Tensor max_pool1d_kernel(const at::Tensor& self, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                    at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  if (gate_session({&self}) == nullptr) {
    const StockKernels exclude;
    return at::max_pool1d(self, kernel_size, stride, padding, dilation, ceil_mode);
  }
  return std::get<0>(at::max_pool1d_with_indices(self, kernel_size, stride, padding, dilation, ceil_mode));
}

inline TwoTensors adaptive_max_pool2d_kernel(const at::Tensor& self, at::IntArrayRef output_size) {
  return pooling_kernel("adaptive_max_pool2d", self, {Pooling::adaptive, 2},
                        [&] { return at::adaptive_max_pool2d(self, output_size); });
}

inline TwoTensors adaptive_max_pool3d_kernel(const at::Tensor& self, at::IntArrayRef output_size) {
  return pooling_kernel("adaptive_max_pool3d", self, {Pooling::adaptive, 3},
                        [&] { return at::adaptive_max_pool3d(self, output_size); });
}

inline TwoTensors fractional_max_pool2d_kernel(const at::Tensor& self, at::IntArrayRef kernel_size,
                                               at::IntArrayRef output_size, const at::Tensor& samples) {
  return pooling_kernel("fractional_max_pool2d", self,
                        {.kind = Pooling::fractional,
                         .dimensions = 2,
                         .kernel_size = kernel_size.vec(),
                         .output_size = output_size.vec()},
                        [&] { return at::fractional_max_pool2d(self, kernel_size, output_size, samples); });
}

inline TwoTensors fractional_max_pool3d_kernel(const at::Tensor& self, at::IntArrayRef kernel_size,
                                               at::IntArrayRef output_size, const at::Tensor& samples) {
  return pooling_kernel("fractional_max_pool3d", self,
                        {.kind = Pooling::fractional,
                         .dimensions = 3,
                         .kernel_size = kernel_size.vec(),
                         .output_size = output_size.vec()},
                        [&] { return at::fractional_max_pool3d(self, kernel_size, output_size, samples); });
}

}  // namespace microreg::detail
