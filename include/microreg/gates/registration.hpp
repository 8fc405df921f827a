/// @file
/// Puts the kernels with gates on the key that the scopes include.
#pragma once

#include <torch/library.h>
#include <microreg/detail/interception.hpp>
#include <microreg/gates/activations.hpp>
#include <microreg/gates/clamp.hpp>
#include <microreg/gates/extrema.hpp>
#include <microreg/gates/pooling.hpp>

namespace microreg::detail {

/// Registers the kernels, once per process: another shared object that includes this header finds them there.
class GateRegistration {
 public:
  GateRegistration() {
    add_activations(kernels_);
    add_clamps(kernels_);
    add_extrema(kernels_);
    add_pooling(kernels_);
  }

 private:
  static void add_activations(Interceptors& kernels) {
    kernels.add("relu", TORCH_FN(relu_kernel));
    kernels.add("relu_", TORCH_FN(relu_in_place_kernel));
    kernels.add("leaky_relu", TORCH_FN(leaky_relu_kernel));
    kernels.add("leaky_relu_", TORCH_FN(leaky_relu_in_place_kernel));
    kernels.add("rrelu_with_noise", TORCH_FN(rrelu_kernel));
    kernels.add("rrelu_with_noise_", TORCH_FN(rrelu_in_place_kernel));
    kernels.add("_prelu_kernel", TORCH_FN(prelu_kernel));
    kernels.add("threshold", TORCH_FN(threshold_kernel));
    kernels.add("threshold_", TORCH_FN(threshold_in_place_kernel));
    kernels.add("hardtanh", TORCH_FN(hardtanh_kernel));
    kernels.add("hardtanh_", TORCH_FN(hardtanh_in_place_kernel));
    kernels.add("hardshrink", TORCH_FN(hardshrink_kernel));
    kernels.add("softshrink", TORCH_FN(softshrink_kernel));
    kernels.add("hardsigmoid", TORCH_FN(hardsigmoid_kernel));
    kernels.add("hardsigmoid_", TORCH_FN(hardsigmoid_in_place_kernel));
    kernels.add("hardswish", TORCH_FN(hardswish_kernel));
    kernels.add("hardswish_", TORCH_FN(hardswish_in_place_kernel));
    kernels.add("elu", TORCH_FN(elu_kernel));
    kernels.add("elu_", TORCH_FN(elu_in_place_kernel));
  }

  static void add_clamps(Interceptors& kernels) {
    kernels.add("clamp", TORCH_FN(clamp_kernel));
    kernels.add("clamp_", TORCH_FN(clamp_in_place_kernel));
    kernels.add("clamp.Tensor", TORCH_FN(clamp_tensor_kernel));
    kernels.add("clamp_.Tensor", TORCH_FN(clamp_tensor_in_place_kernel));
    kernels.add("clamp_min", TORCH_FN(clamp_min_kernel));
    kernels.add("clamp_min_", TORCH_FN(clamp_min_in_place_kernel));
    kernels.add("clamp_min.Tensor", TORCH_FN(clamp_min_tensor_kernel));
    kernels.add("clamp_min_.Tensor", TORCH_FN(clamp_min_tensor_in_place_kernel));
    kernels.add("clamp_max", TORCH_FN(clamp_max_kernel));
    kernels.add("clamp_max_", TORCH_FN(clamp_max_in_place_kernel));
    kernels.add("clamp_max.Tensor", TORCH_FN(clamp_max_tensor_kernel));
    kernels.add("clamp_max_.Tensor", TORCH_FN(clamp_max_tensor_in_place_kernel));
    kernels.add("abs", TORCH_FN(abs_kernel));
    kernels.add("abs_", TORCH_FN(abs_in_place_kernel));
  }

  static void add_extrema(Interceptors& kernels) {
    kernels.add("max", TORCH_FN(max_kernel));
    kernels.add("min", TORCH_FN(min_kernel));
    kernels.add("max.dim", TORCH_FN(max_dim_kernel));
    kernels.add("min.dim", TORCH_FN(min_dim_kernel));
    kernels.add("amax", TORCH_FN(amax_kernel));
    kernels.add("amin", TORCH_FN(amin_kernel));
    kernels.add("maximum", TORCH_FN(maximum_kernel));
    kernels.add("minimum", TORCH_FN(minimum_kernel));
    kernels.add("fmax", TORCH_FN(fmax_kernel));
    kernels.add("fmin", TORCH_FN(fmin_kernel));
  }

  static void add_pooling(Interceptors& kernels) {
    kernels.add("max_pool1d", TORCH_FN(max_pool1d_kernel));
    kernels.add("max_pool2d_with_indices", TORCH_FN(max_pool2d_kernel));
    kernels.add("max_pool3d_with_indices", TORCH_FN(max_pool3d_kernel));
    kernels.add("adaptive_max_pool2d", TORCH_FN(adaptive_max_pool2d_kernel));
    kernels.add("adaptive_max_pool3d", TORCH_FN(adaptive_max_pool3d_kernel));
    kernels.add("fractional_max_pool2d", TORCH_FN(fractional_max_pool2d_kernel));
    kernels.add("fractional_max_pool3d", TORCH_FN(fractional_max_pool3d_kernel));
  }

  Interceptors kernels_;
};

MICROREG_INLINE void register_gate_kernels() { static const GateRegistration registration; }

}  // namespace microreg::detail
