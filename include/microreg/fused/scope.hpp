/// @file
/// FusedScope: exact double backward at the cost that arithmetic asks for.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>
#include <microreg/fused/batch_norm.hpp>
#include <microreg/fused/convolution.hpp>
#include <microreg/fused/gelu.hpp>
#include <microreg/fused/group_norm.hpp>
#include <microreg/fused/interception.hpp>
#include <microreg/fused/layer_norm.hpp>
#include <microreg/fused/max_pool.hpp>
#include <microreg/fused/softmax.hpp>

#include <cstdlib>
#include <mutex>
#include <string>
#include <string_view>

namespace microreg {

namespace detail {

/// Registers the kernels, once per process: another shared object that includes this header finds them there.
class FusedRegistration {
 public:
  FusedRegistration() {
    const std::lock_guard lock(registration_mutex());
    register_fallthrough();
    add("convolution_backward", TORCH_FN(convolution_backward_kernel));
    add("native_batch_norm_backward", TORCH_FN(native_batch_norm_backward_kernel));
    add("cudnn_batch_norm_backward", TORCH_FN(cudnn_batch_norm_backward_kernel));
    add("native_layer_norm_backward", TORCH_FN(native_layer_norm_backward_kernel));
    add("max_pool2d_with_indices_backward", TORCH_FN(max_pool2d_backward_kernel));
    add("gelu_backward", TORCH_FN(gelu_backward_kernel));
    add("group_norm", TORCH_FN(group_norm_kernel));
    add("_softmax_backward_data", TORCH_FN(softmax_backward_kernel));
  }

 private:
  template <class Kernel>
  void add(const std::string& operation, Kernel kernel) {
    const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(("aten::" + operation).c_str(), "");
    if (is_chosen(operation) && !handle.hasKernelForDispatchKey(interception_key)) {
      kernels_.impl(operation.c_str(), kernel);
    }
  }

  /// To measure what each operation is worth: MICROREG_FUSED_OPERATIONS="gelu_backward,..." leaves out all others.
  static bool is_chosen(const std::string& operation) {
    const char* chosen = std::getenv("MICROREG_FUSED_OPERATIONS");
    return chosen == nullptr || (std::string(",") + chosen + ",").find("," + operation + ",") != std::string::npos;
  }

  torch::Library kernels_{torch::Library::IMPL, "aten", interception_key, __FILE__, __LINE__};
};

}  // namespace detail

/// While it lives, backward passes with create_graph on this thread are recorded so that differentiating them again is
/// fast and exact.
class FusedScope {
 public:
  /// A scope that is not `wanted` does nothing, as all do where MICROREG_FUSED turns them off.
  explicit FusedScope(bool wanted = true) : interception_(wanted && enabled() && registered()) {}
  FusedScope(const FusedScope&) = delete;
  FusedScope& operator=(const FusedScope&) = delete;
  ~FusedScope() = default;

  [[nodiscard]] static bool enabled() {
    const char* value = std::getenv("MICROREG_FUSED");
    return value == nullptr || (std::string_view(value) != "0" && std::string_view(value) != "off");
  }

 private:
  static bool registered() {
    static const detail::FusedRegistration registration;
    return true;
  }

  detail::Interception interception_;
};

}  // namespace microreg
