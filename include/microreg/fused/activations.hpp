/// @file
/// Double backward of piecewise-linear activations without LibTorch's zeros.
///
/// Their backward operations multiply what comes in by a slope that the input chooses, and so do the backward
/// operations of these. The derivative by the input is zero, which LibTorch writes out, keeps until the pass reaches
/// the activation in the forward graph, and adds up there: a tensor and two passes over memory for nothing. Here it is
/// undefined, which autograd skips.
#pragma once

#include <microreg/fused/rule.hpp>

namespace microreg::inline MICROREG_ABI::detail {

inline Tensors piecewise_linear_derivative(const Call& call, const Tensors& upstream, OutputMask needs) {
  return {needs[0] ? call.with(0, upstream[0]).run()[0] : at::Tensor(), at::Tensor()};
}

/// Of relu and threshold.
inline constexpr Rule threshold_backward_rule{
    .schema = "aten::threshold_backward(Tensor grad_output, Tensor self, Scalar threshold) -> Tensor",
    .inputs = {0, 1},
    .saved = {1},
    .derivative = piecewise_linear_derivative};

/// Of hardtanh and relu6.
inline constexpr Rule hardtanh_backward_rule{
    .schema = "aten::hardtanh_backward(Tensor grad_output, Tensor self, Scalar min_val, Scalar max_val) -> Tensor",
    .inputs = {0, 1},
    .saved = {1},
    .derivative = piecewise_linear_derivative};

inline constexpr Rule leaky_relu_backward_rule{
    .schema =
        "aten::leaky_relu_backward(Tensor grad_output, Tensor self, Scalar negative_slope, bool self_is_result) -> "
        "Tensor",
    .inputs = {0, 1},
    .saved = {1},
    .derivative = piecewise_linear_derivative,
    // In place, a negative slope leaves no trace of which side an input was on: LibTorch refuses.
    .fits = [](const Call& call) {
      return !call.arguments[3].toBool() || call.arguments[2].toScalar().toDouble() >= 0;
    }};

/// Of hardsigmoid, which LibTorch does not differentiate twice.
inline constexpr Rule hardsigmoid_backward_rule{
    .schema = "aten::hardsigmoid_backward(Tensor grad_output, Tensor self) -> Tensor",
    .inputs = {0, 1},
    .saved = {1},
    .derivative = piecewise_linear_derivative};

}  // namespace microreg::inline MICROREG_ABI::detail
