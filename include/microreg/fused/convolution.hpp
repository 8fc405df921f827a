/// @file
/// Double backward of convolution with the same kernels as its backward.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <microreg/detail/config.hpp>
#include <microreg/fused/rule.hpp>
#include <microreg/fused/weight_gradient.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// The arguments of a convolution_backward: grad_output 0, input 1, weight 2, bias_sizes 3, stride 4, padding 5,
/// dilation 6, transposed 7, output_padding 8, groups 9, output_mask 10.
struct ConvolutionCall {
  const Call& call;

  [[nodiscard]] std::vector<std::int64_t> numbers(std::size_t position) const {
    return call.arguments[position].toIntVector();
  }
  [[nodiscard]] std::array<std::int64_t, 2> pair(std::size_t position) const {
    const auto all = numbers(position);
    return {all.front(), all.back()};
  }
  [[nodiscard]] bool transposed() const { return call.arguments[7].toBool(); }

  [[nodiscard]] at::Tensor forward(const at::Tensor& input, const at::Tensor& weight,
                                   const std::optional<at::Tensor>& bias) const {
    return at::convolution(input, weight, bias, numbers(4), numbers(5), numbers(6), transposed(), numbers(8),
                           call.arguments[9].toInt());
  }

  /// The same call of other tensors, for one of its results.
  [[nodiscard]] at::Tensor backward(std::size_t result, const at::Tensor& input, const at::Tensor& weight) const;

  /// Whether the convolution is pointwise and strided, in two dimensions: most pixels of its input do not count then.
  [[nodiscard]] bool skips_pixels() const {
    const at::Tensor input = call.tensor(1), weight = call.tensor(2);
    return input.is_cpu() && !at::GradMode::is_enabled() && !transposed() && input.dim() == 4 && weight.size(2) == 1 &&
           weight.size(3) == 1 && pair(5) == std::array<std::int64_t, 2>{0, 0} &&
           pair(4) != std::array<std::int64_t, 2>{1, 1};
  }
};

inline Call with_mask(const Call& call, OutputMask mask) {
  return call.with(10, c10::List<bool>({mask[0], mask[1], mask[2]}));
}

/// convolution_backward itself, where LibTorch's is slow.
inline Tensors convolution_backward(const Call& call) {
  const ConvolutionCall convolution{call};
  const at::Tensor grad_output = call.tensor(0), input = call.tensor(1), weight = call.tensor(2);
  const OutputMask mask = call.mask(10);
  if (mask[1] && !convolution.transposed() && prefers_product(grad_output, input, weight)) {
    Tensors results(3);
    if (mask[0]) {
      results[0] = convolution_backward(with_mask(call, {true, false, false}))[0];
    }
    results[1] = weight_gradient_by_product(grad_output, input, weight,
                                            {convolution.pair(4), convolution.pair(5), convolution.pair(6)});
    if (mask[2]) {
      results[2] = grad_output.sum(at::IntArrayRef{0, 2, 3});
    }
    return results;
  }
  if (convolution.skips_pixels()) {  // LibTorch makes copies of the whole input's gradient
    const auto used = [strides = convolution.pair(4)](const at::Tensor& t) {
      return t.slice(2, 0, {}, strides[0]).slice(3, 0, {}, strides[1]);
    };
    const auto format = input.suggest_memory_format();
    Tensors results =
        convolution_backward(call.with(1, used(input).contiguous(format)).with(4, std::vector<std::int64_t>{1, 1}));
    if (mask[0]) {
      const at::Tensor d_input = at::zeros_like(input, format);
      used(d_input).copy_(results[0]);
      results[0] = d_input;
    }
    return results;
  }
  return call.run();
}

inline at::Tensor ConvolutionCall::backward(std::size_t result, const at::Tensor& input,
                                            const at::Tensor& weight) const {
  return convolution_backward(
      with_mask(call.with(1, input).with(2, weight), {result == 0, result == 1, false}))[result];
}

/// For incoming v (of the input gradient), a (weight), b (bias):
///
///     d/d grad_output = conv(v, weight) + conv(input, a) + b
///     d/d input       = input gradient of the convolution with weight a, at grad_output
///     d/d weight      = weight gradient of the convolution with input v, at grad_output.
///
/// LibTorch's own formula computes d/d weight as a convolution with a kernel as large as the picture.
inline Tensors convolution_double_backward(const Call& call, const Tensors& upstream, OutputMask needs) {
  const ConvolutionCall convolution{call};
  const at::Tensor grad_output = call.tensor(0), input = call.tensor(1), weight = call.tensor(2);
  const at::Tensor &v = upstream[0], &a = upstream[1], &b = upstream[2];
  at::Tensor d_grad_output, d_input, d_weight;
  if (needs[0]) {
    const std::optional<at::Tensor> bias = b.defined() ? std::optional(b) : std::nullopt;
    if (v.defined()) {
      d_grad_output = convolution.forward(v, weight, bias);
    }
    if (a.defined()) {
      const at::Tensor part = convolution.forward(input, a, v.defined() ? std::nullopt : bias);
      d_grad_output = d_grad_output.defined() ? d_grad_output.add_(part) : part;
    }
    if (!d_grad_output.defined()) {
      std::vector<std::int64_t> shape(static_cast<std::size_t>(grad_output.dim()), 1);
      shape[static_cast<std::size_t>(grad_output.dim() - (weight.dim() - 1))] = -1;
      d_grad_output = b.reshape(shape).expand_as(grad_output);
    }
  }
  // One after the other: in one call, the first result would wait while the other's copies in other layouts are made.
  if (needs[2] && v.defined()) {
    d_weight = convolution.backward(1, v, weight);
  }
  if (needs[1] && a.defined()) {
    d_input = convolution.backward(0, input, a);
  }
  return {d_grad_output, d_input, d_weight};
}

inline constexpr Rule convolution_backward_rule{
    .schema =
        "aten::convolution_backward(Tensor grad_output, Tensor input, Tensor weight, SymInt[]? bias_sizes, SymInt[] "
        "stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups, bool[3] "
        "output_mask) -> (Tensor, Tensor, Tensor)",
    .inputs = {0, 1, 2},
    .saved = {0, 1, 2},
    .derivative = convolution_double_backward,
    .forward = convolution_backward};

}  // namespace microreg::inline MICROREG_ABI::detail
