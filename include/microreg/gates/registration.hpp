/// @file
/// Puts the kernels with gates on the key that the scopes include.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>
#include <microreg/detail/interception.hpp>
#include <microreg/gates/activations.hpp>
#include <microreg/gates/clamp.hpp>
#include <microreg/gates/extrema.hpp>
#include <microreg/gates/pooling.hpp>

#include <memory>
#include <mutex>

namespace microreg::detail {

/// Registers the kernels, once per process: another shared object that includes this header finds them there.
class GateRegistration {
 public:
  GateRegistration() {
    const std::lock_guard lock(registration_mutex());
    auto& dispatcher = c10::Dispatcher::singleton();
    if (dispatcher.findSchemaOrThrow("aten::relu", "").hasKernelForDispatchKey(interception_key)) {
      return;
    }
    register_fallthrough();
    kernels_ = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", interception_key, __FILE__, __LINE__);
    add_activations(*kernels_);
    add_clamps(*kernels_);
    add_extrema(*kernels_);
    add_pooling(*kernels_);
  }

 private:
  static void add_activations(torch::Library& kernels) {
    kernels.impl("relu", TORCH_FN(relu_kernel));
    kernels.impl("relu_", TORCH_FN(relu_in_place_kernel));
    kernels.impl("leaky_relu", TORCH_FN(leaky_relu_kernel));
    kernels.impl("leaky_relu_", TORCH_FN(leaky_relu_in_place_kernel));
    kernels.impl("rrelu_with_noise", TORCH_FN(rrelu_kernel));
    kernels.impl("rrelu_with_noise_", TORCH_FN(rrelu_in_place_kernel));
    kernels.impl("_prelu_kernel", TORCH_FN(prelu_kernel));
    kernels.impl("threshold", TORCH_FN(threshold_kernel));
    kernels.impl("threshold_", TORCH_FN(threshold_in_place_kernel));
    kernels.impl("hardtanh", TORCH_FN(hardtanh_kernel));
    kernels.impl("hardtanh_", TORCH_FN(hardtanh_in_place_kernel));
    kernels.impl("hardshrink", TORCH_FN(hardshrink_kernel));
    kernels.impl("softshrink", TORCH_FN(softshrink_kernel));
    kernels.impl("hardsigmoid", TORCH_FN(hardsigmoid_kernel));
    kernels.impl("hardsigmoid_", TORCH_FN(hardsigmoid_in_place_kernel));
    kernels.impl("hardswish", TORCH_FN(hardswish_kernel));
    kernels.impl("hardswish_", TORCH_FN(hardswish_in_place_kernel));
    kernels.impl("elu", TORCH_FN(elu_kernel));
    kernels.impl("elu_", TORCH_FN(elu_in_place_kernel));
  }

  static void add_clamps(torch::Library& kernels) {
    kernels.impl("clamp", TORCH_FN(clamp_kernel));
    kernels.impl("clamp_", TORCH_FN(clamp_in_place_kernel));
    kernels.impl("clamp.Tensor", TORCH_FN(clamp_tensor_kernel));
    kernels.impl("clamp_.Tensor", TORCH_FN(clamp_tensor_in_place_kernel));
    kernels.impl("clamp_min", TORCH_FN(clamp_min_kernel));
    kernels.impl("clamp_min_", TORCH_FN(clamp_min_in_place_kernel));
    kernels.impl("clamp_min.Tensor", TORCH_FN(clamp_min_tensor_kernel));
    kernels.impl("clamp_min_.Tensor", TORCH_FN(clamp_min_tensor_in_place_kernel));
    kernels.impl("clamp_max", TORCH_FN(clamp_max_kernel));
    kernels.impl("clamp_max_", TORCH_FN(clamp_max_in_place_kernel));
    kernels.impl("clamp_max.Tensor", TORCH_FN(clamp_max_tensor_kernel));
    kernels.impl("clamp_max_.Tensor", TORCH_FN(clamp_max_tensor_in_place_kernel));
    kernels.impl("abs", TORCH_FN(abs_kernel));
    kernels.impl("abs_", TORCH_FN(abs_in_place_kernel));
  }

  static void add_extrema(torch::Library& kernels) {
    kernels.impl("max", TORCH_FN(max_kernel));
    kernels.impl("min", TORCH_FN(min_kernel));
    kernels.impl("max.dim", TORCH_FN(max_dim_kernel));
    kernels.impl("min.dim", TORCH_FN(min_dim_kernel));
    kernels.impl("amax", TORCH_FN(amax_kernel));
    kernels.impl("amin", TORCH_FN(amin_kernel));
    kernels.impl("maximum", TORCH_FN(maximum_kernel));
    kernels.impl("minimum", TORCH_FN(minimum_kernel));
    kernels.impl("fmax", TORCH_FN(fmax_kernel));
    kernels.impl("fmin", TORCH_FN(fmin_kernel));
  }

  static void add_pooling(torch::Library& kernels) {
    kernels.impl("max_pool1d", TORCH_FN(max_pool1d_kernel));
    kernels.impl("max_pool2d_with_indices", TORCH_FN(max_pool2d_kernel));
    kernels.impl("max_pool3d_with_indices", TORCH_FN(max_pool3d_kernel));
    kernels.impl("adaptive_max_pool2d", TORCH_FN(adaptive_max_pool2d_kernel));
    kernels.impl("adaptive_max_pool3d", TORCH_FN(adaptive_max_pool3d_kernel));
    kernels.impl("fractional_max_pool2d", TORCH_FN(fractional_max_pool2d_kernel));
    kernels.impl("fractional_max_pool3d", TORCH_FN(fractional_max_pool3d_kernel));
  }

  std::unique_ptr<torch::Library> kernels_;
};

MICROREG_KERNEL_LINKAGE void register_gate_kernels() { static const GateRegistration registration; }

}  // namespace microreg::detail
