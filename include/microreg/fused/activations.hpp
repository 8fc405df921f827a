/// @file
/// Double backward of piecewise-linear activations without LibTorch's zeros.
///
/// Their backward operations multiply what comes in by a slope that the input chooses. The derivative by that input is
/// zero, which LibTorch writes out, keeps until the pass reaches the activation in the forward graph, and adds up
/// there: a tensor and two passes over memory for nothing. Here it is undefined, which autograd skips.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <microreg/detail/interception.hpp>

#include <array>
#include <cstddef>
#include <string>

namespace microreg::detail {

/// Backward of relu and threshold.
struct ThresholdSlopes {
  static constexpr std::size_t bounds = 1;
  static at::Tensor apply(const at::Tensor& dy, const at::Tensor& x, const std::array<at::Scalar, bounds>& bound) {
    return at::threshold_backward(dy, x, bound[0]);
  }
};

/// Backward of hardtanh and relu6.
struct HardtanhSlopes {
  static constexpr std::size_t bounds = 2;
  static at::Tensor apply(const at::Tensor& dy, const at::Tensor& x, const std::array<at::Scalar, bounds>& bound) {
    return at::hardtanh_backward(dy, x, bound[0], bound[1]);
  }
};

/// Backward of leaky_relu. The second number is whether x is the result.
struct LeakyReluSlopes {
  static constexpr std::size_t bounds = 2;
  static at::Tensor apply(const at::Tensor& dy, const at::Tensor& x, const std::array<at::Scalar, bounds>& bound) {
    return at::leaky_relu_backward(dy, x, bound[0], bound[1].toBool());
  }
};

/// dy times slopes chosen by x, as a node whose own backward is the same for what comes in.
template <class Slopes>
struct PiecewiseLinearBackward : torch::autograd::Function<PiecewiseLinearBackward<Slopes>> {
  using Bounds = std::array<at::Scalar, Slopes::bounds>;

  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& dy, const at::Tensor& x,
                            const Bounds& bounds) {
    context->save_for_backward({x});
    context->set_materialize_grads(false);
    for (std::size_t i = 0; i < bounds.size(); ++i) {
      context->saved_data[std::to_string(i)] = bounds[i];
    }
    return Slopes::apply(dy, x, bounds);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& upstream) {
    if (!upstream[0].defined() || !context->needs_input_grad(0)) {
      return {{}, {}, {}};
    }
    Bounds bounds;
    for (std::size_t i = 0; i < bounds.size(); ++i) {
      bounds[i] = context->saved_data[std::to_string(i)].toScalar();
    }
    return {Slopes::apply(upstream[0], context->get_saved_variables()[0], bounds), {}, {}};
  }
};

template <class Slopes>
at::Tensor piecewise_linear_backward(const at::Tensor& dy, const at::Tensor& x,
                                     const std::array<at::Scalar, Slopes::bounds>& bounds) {
  const StockKernels stock;
  return should_fuse({dy, x}) ? PiecewiseLinearBackward<Slopes>::apply(dy, x, bounds) : Slopes::apply(dy, x, bounds);
}

inline at::Tensor threshold_backward_kernel(const at::Tensor& dy, const at::Tensor& x, const at::Scalar& threshold) {
  return piecewise_linear_backward<ThresholdSlopes>(dy, x, {threshold});
}

inline at::Tensor hardtanh_backward_kernel(const at::Tensor& dy, const at::Tensor& x, const at::Scalar& low,
                                           const at::Scalar& high) {
  return piecewise_linear_backward<HardtanhSlopes>(dy, x, {low, high});
}

inline at::Tensor leaky_relu_backward_kernel(const at::Tensor& dy, const at::Tensor& x, const at::Scalar& slope,
                                             bool self_is_result) {
  return piecewise_linear_backward<LeakyReluSlopes>(dy, x, {slope, at::Scalar(self_is_result)});
}

}  // namespace microreg::detail
