/// @file
/// Puts the fused kernels on the key that the scope includes.
#pragma once

#include <torch/library.h>
#include <microreg/detail/interception.hpp>
#include <microreg/fused/activations.hpp>
#include <microreg/fused/batch_norm.hpp>
#include <microreg/fused/convolution.hpp>
#include <microreg/fused/gelu.hpp>
#include <microreg/fused/group_norm.hpp>
#include <microreg/fused/layer_norm.hpp>
#include <microreg/fused/max_pool.hpp>
#include <microreg/fused/softmax.hpp>

#include <cstdlib>
#include <string>

namespace microreg::detail {

/// Registers the kernels, once per process: another shared object that includes this header finds them there.
class FusedRegistration {
 public:
  FusedRegistration() {
    add("convolution_backward", TORCH_FN(convolution_backward_kernel));
    add("native_batch_norm_backward", TORCH_FN(native_batch_norm_backward_kernel));
    add("cudnn_batch_norm_backward", TORCH_FN(cudnn_batch_norm_backward_kernel));
    add("native_layer_norm_backward", TORCH_FN(native_layer_norm_backward_kernel));
    add("threshold_backward", TORCH_FN(threshold_backward_kernel));
    add("hardtanh_backward", TORCH_FN(hardtanh_backward_kernel));
    add("leaky_relu_backward", TORCH_FN(leaky_relu_backward_kernel));
    add("max_pool2d_with_indices_backward", TORCH_FN(max_pool_backward_kernel<2>));
    add("max_pool3d_with_indices_backward", TORCH_FN(max_pool_backward_kernel<3>));
    add("gelu_backward", TORCH_FN(gelu_backward_kernel));
    add("group_norm", TORCH_FN(group_norm_kernel));
    add("_softmax_backward_data", TORCH_FN(softmax_backward_kernel));
  }

 private:
  template <class Kernel>
  void add(const char* operation, Kernel kernel) {
    if (is_chosen(operation)) {
      kernels_.add(operation, kernel);
    }
  }

  /// To measure what each operation is worth: MICROREG_FUSED_OPERATIONS="gelu_backward,..." leaves out all others.
  static bool is_chosen(const std::string& operation) {
    const char* chosen = std::getenv("MICROREG_FUSED_OPERATIONS");
    return chosen == nullptr || (std::string(",") + chosen + ",").find("," + operation + ",") != std::string::npos;
  }

  Interceptors kernels_;
};

MICROREG_INLINE void register_fused_kernels() { static const FusedRegistration registration; }

}  // namespace microreg::detail
