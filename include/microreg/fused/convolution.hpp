/// @file
/// Double backward of convolution with the same kernels as its backward.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <microreg/detail/interception.hpp>
#include <microreg/fused/output_mask.hpp>
#include <microreg/fused/weight_gradient.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace microreg::detail {

/// The geometry of a convolution, 1d to 3d, plain or transposed.
struct ConvolutionGeometry {
  std::vector<std::int64_t> stride;
  std::vector<std::int64_t> padding;
  std::vector<std::int64_t> dilation;
  bool transposed;
  std::vector<std::int64_t> output_padding;
  std::int64_t groups;

  [[nodiscard]] at::Tensor forward(const at::Tensor& input, const at::Tensor& weight,
                                   const std::optional<at::Tensor>& bias) const {
    return at::convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups);
  }
  [[nodiscard]] ThreeTensors backward(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                                      at::OptionalIntArrayRef bias_sizes, OutputMask mask) const {
    if (mask[1] && !transposed && prefers_product(grad_output, input, weight)) {
      const auto pair = [](const std::vector<std::int64_t>& of) { return std::array{of.front(), of.back()}; };
      const at::Tensor d_bias = mask[2] ? grad_output.sum(at::IntArrayRef{0, 2, 3}) : at::Tensor();
      const at::Tensor d_input =
          mask[0] ? std::get<0>(backward(grad_output, input, weight, bias_sizes, {true, false, false})) : at::Tensor();
      return {d_input,
              weight_gradient_by_product(grad_output, input, weight, {pair(stride), pair(padding), pair(dilation)}),
              d_bias};
    }
    if (skips_pixels(input, weight)) {
      return backward_of_pixels_used(grad_output, input, weight, bias_sizes, mask);
    }
    return at::convolution_backward(grad_output, input, weight, bias_sizes, stride, padding, dilation, transposed,
                                    output_padding, groups, mask);
  }

  /// Whether the convolution is pointwise and strided, in two dimensions: most pixels of its input do not count then.
  [[nodiscard]] bool skips_pixels(const at::Tensor& input, const at::Tensor& weight) const {
    const auto all = [](const std::vector<std::int64_t>& values, std::int64_t value) {
      return std::all_of(values.begin(), values.end(), [value](std::int64_t each) { return each == value; });
    };
    return input.is_cpu() && !at::GradMode::is_enabled() && !transposed && input.dim() == 4 && weight.size(2) == 1 &&
           weight.size(3) == 1 && all(padding, 0) && !all(stride, 1);
  }

  /// The same as backward(), from those pixels alone. LibTorch makes copies of the whole input's gradient.
  [[nodiscard]] ThreeTensors backward_of_pixels_used(const at::Tensor& grad_output, const at::Tensor& input,
                                                     const at::Tensor& weight, at::OptionalIntArrayRef bias_sizes,
                                                     OutputMask mask) const {
    const auto used = [&](const at::Tensor& t) {
      return t.slice(2, 0, {}, stride.front()).slice(3, 0, {}, stride.back());
    };
    ConvolutionGeometry dense = *this;
    dense.stride = {1, 1};
    auto [d_used, d_weight, d_bias] =
        dense.backward(grad_output, used(input).contiguous(input.suggest_memory_format()), weight, bias_sizes, mask);
    at::Tensor d_input;
    if (mask[0]) {
      d_input = at::zeros_like(input, input.suggest_memory_format());
      used(d_input).copy_(d_used);
    }
    return {d_input, d_weight, d_bias};
  }

  using SavedData = ska::flat_hash_map<std::string, c10::IValue>;

  void save(SavedData& into) const {
    into["stride"] = stride;
    into["padding"] = padding;
    into["dilation"] = dilation;
    into["transposed"] = transposed;
    into["output_padding"] = output_padding;
    into["groups"] = groups;
  }
  static ConvolutionGeometry restore(SavedData& from) {
    return {from["stride"].toIntVector(), from["padding"].toIntVector(),        from["dilation"].toIntVector(),
            from["transposed"].toBool(),  from["output_padding"].toIntVector(), from["groups"].toInt()};
  }
};

/// convolution_backward as a node whose own backward is, for incoming v (of the input gradient), a (weight), b (bias),
///
///     d/d grad_output = conv(v, weight) + conv(input, a) + b
///     d/d input       = input gradient of the convolution with weight a, at grad_output
///     d/d weight      = weight gradient of the convolution with input v, at grad_output.
///
/// LibTorch's own formula computes d/d weight as a convolution with a kernel as large as the picture.
struct ConvolutionBackward : torch::autograd::Function<ConvolutionBackward> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context,
                                                const at::Tensor& grad_output, const at::Tensor& input,
                                                const at::Tensor& weight, const std::vector<std::int64_t>& bias_sizes,
                                                const ConvolutionGeometry& geometry, OutputMask mask) {
    context->save_for_backward({grad_output, input, weight});
    context->set_materialize_grads(false);
    geometry.save(context->saved_data);
    context->saved_data["mask"] = pack(mask);
    auto [grad_input, grad_weight, grad_bias] = geometry.backward(
        grad_output, input, weight, mask[2] ? at::OptionalIntArrayRef(bias_sizes) : at::OptionalIntArrayRef(), mask);
    return gather(mask, {grad_input, grad_weight, grad_bias});
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list upstream) {
    const auto saved = context->get_saved_variables();
    const at::Tensor& grad_output = saved[0];
    const at::Tensor& input = saved[1];
    const at::Tensor& weight = saved[2];
    const auto geometry = ConvolutionGeometry::restore(context->saved_data);
    const auto [v, a, b] = spread(unpack(context->saved_data["mask"]), std::move(upstream));

    at::Tensor d_grad_output;
    if (context->needs_input_grad(0)) {
      const std::optional<at::Tensor> bias = b.defined() ? std::optional(b) : std::nullopt;
      if (v.defined()) {
        d_grad_output = geometry.forward(v, weight, bias);
      }
      if (a.defined()) {
        const at::Tensor part = geometry.forward(input, a, v.defined() ? std::nullopt : bias);
        d_grad_output = d_grad_output.defined() ? d_grad_output.add_(part) : part;
      }
      if (!d_grad_output.defined() && b.defined()) {
        std::vector<std::int64_t> shape(static_cast<std::size_t>(grad_output.dim()), 1);
        shape[static_cast<std::size_t>(grad_output.dim() - (weight.dim() - 1))] = -1;
        d_grad_output = b.reshape(shape).expand_as(grad_output);
      }
    }
    // One after the other: in one call, the first result would wait while the other's copies in other layouts are made.
    at::Tensor d_weight;
    if (context->needs_input_grad(2) && v.defined()) {
      d_weight =
          std::get<1>(geometry.backward(grad_output, v, weight, at::OptionalIntArrayRef(), {false, true, false}));
    }
    at::Tensor d_input;
    if (context->needs_input_grad(1) && a.defined()) {
      d_input = std::get<0>(geometry.backward(grad_output, input, a, at::OptionalIntArrayRef(), {true, false, false}));
    }
    return {d_grad_output, d_input, d_weight, {}, {}, {}};
  }
};

inline ThreeTensors convolution_backward_kernel(const at::Tensor& grad_output, const at::Tensor& input,
                                                const at::Tensor& weight, at::OptionalSymIntArrayRef bias_sizes,
                                                c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
                                                c10::SymIntArrayRef dilation, bool transposed,
                                                c10::SymIntArrayRef output_padding,
                                                c10::SymInt groups,  // NOLINT(performance-unnecessary-value-param)
                                                OutputMask mask) {
  const StockKernels stock;
  const bool recorded = should_fuse({grad_output, input, weight}) && (mask[0] || mask[1] || mask[2]);
  if (!recorded && !(mask[1] && !transposed && prefers_product(grad_output, input, weight))) {
    return at::_ops::convolution_backward::call(grad_output, input, weight, bias_sizes, stride, padding, dilation,
                                                transposed, output_padding, groups, mask);
  }
  std::vector<std::int64_t> bias;
  if (bias_sizes.has_value()) {
    const auto sizes = C10_AS_INTARRAYREF_SLOW(*bias_sizes);
    bias.assign(sizes.begin(), sizes.end());
  }
  const ConvolutionGeometry geometry{
      C10_AS_INTARRAYREF_SLOW(stride).vec(),         C10_AS_INTARRAYREF_SLOW(padding).vec(),
      C10_AS_INTARRAYREF_SLOW(dilation).vec(),       transposed,
      C10_AS_INTARRAYREF_SLOW(output_padding).vec(), groups.guard_int(__FILE__, __LINE__)};
  if (!recorded) {
    return geometry.backward(grad_output, input, weight,
                             bias_sizes.has_value() ? at::OptionalIntArrayRef(bias) : at::OptionalIntArrayRef(), mask);
  }
  return spread(mask, ConvolutionBackward::apply(grad_output, input, weight, bias, geometry, mask));
}

}  // namespace microreg::detail
