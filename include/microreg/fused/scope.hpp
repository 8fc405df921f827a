/// @file
/// FusedScope: exact double backward at the cost that arithmetic asks for.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>
#include <microreg/fused/batch_norm.hpp>
#include <microreg/fused/convolution.hpp>
#include <microreg/fused/gelu.hpp>
#include <microreg/fused/interception.hpp>
#include <microreg/fused/layer_norm.hpp>
#include <microreg/fused/softmax.hpp>

#include <cstdlib>
#include <memory>
#include <optional>
#include <string_view>

namespace microreg {

namespace detail {

/// Registers the kernels, once per process: another shared object that includes this header finds them there.
class FusedRegistration {
 public:
  FusedRegistration() {
    auto& dispatcher = c10::Dispatcher::singleton();
    const auto convolution = dispatcher.findSchemaOrThrow("aten::convolution_backward", "");
    if (convolution.hasKernelForDispatchKey(interception_key)) {
      return;
    }
    register_fallthrough();
    kernels_ = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", interception_key, __FILE__, __LINE__);
    kernels_->impl("convolution_backward", TORCH_FN(convolution_backward_kernel));
    kernels_->impl("native_batch_norm_backward", TORCH_FN(native_batch_norm_backward_kernel));
    kernels_->impl("cudnn_batch_norm_backward", TORCH_FN(cudnn_batch_norm_backward_kernel));
    kernels_->impl("native_layer_norm_backward", TORCH_FN(native_layer_norm_backward_kernel));
    kernels_->impl("gelu_backward", TORCH_FN(gelu_backward_kernel));
    kernels_->impl("_softmax_backward_data", TORCH_FN(softmax_backward_kernel));
  }

 private:
  std::unique_ptr<torch::Library> kernels_;
};

}  // namespace detail

/// While it lives, backward passes with create_graph on this thread are recorded so that differentiating them again is
/// fast and exact.
class FusedScope {
 public:
  FusedScope() {
    static const detail::FusedRegistration registration;
    if (enabled()) {
      guard_.emplace(detail::interception_key);
    }
  }
  FusedScope(const FusedScope&) = delete;
  FusedScope& operator=(const FusedScope&) = delete;
  ~FusedScope() = default;

  [[nodiscard]] static bool enabled() {
    const char* value = std::getenv("MICROREG_FUSED");
    return value == nullptr || (std::string_view(value) != "0" && std::string_view(value) != "off");
  }

 private:
  std::optional<c10::impl::IncludeDispatchKeyGuard> guard_;
};

}  // namespace microreg
