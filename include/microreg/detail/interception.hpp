/// @file
/// How a scope gets between autograd and LibTorch's kernels: functions registered on a dispatch key that nothing else
/// uses and that falls through for every other operation. The key is included per thread by the scope; the autograd
/// engine carries it into its worker threads. Nothing of LibTorch is overridden, and the stock kernel stays reachable
/// by excluding the key.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/functorch/DynamicLayer.h>
#include <c10/core/DispatchKey.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>
#include <torch/library.h>
#include <microreg/detail/config.hpp>

#include <initializer_list>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

namespace microreg::detail {

inline constexpr c10::DispatchKey interception_key = c10::DispatchKey::TESTING_ONLY_GenericMode;

/// Held while kernels are registered. Its visibility makes it one in the process (with GCC, even for shared objects
/// that hide their symbols and are loaded without sharing them), so that no two objects register the same kernel.
__attribute__((visibility("default"))) inline std::mutex& registration_mutex() {
  static std::mutex mutex;
  return mutex;
}

/// Lets every operation for which nothing is registered pass. To be called with registration_mutex() held.
inline void register_fallthrough() {
  static const std::unique_ptr<torch::Library> fallback = []() -> std::unique_ptr<torch::Library> {
    if (c10::Dispatcher::singleton().hasBackendFallbackForDispatchKey(interception_key)) {
      return nullptr;
    }
    auto library = std::make_unique<torch::Library>(torch::Library::IMPL, "_", interception_key, __FILE__, __LINE__);
    library->fallback(torch::CppFunction::makeFallthrough());
    return library;
  }();
}

/// Kernels on the interception key, registered one by one and taken away with the object. An operation that another
/// shared object has intercepted is left to it. One that this LibTorch does not have, or has with other arguments, runs
/// as it is: that is said once, by name, and kept in missing().
class Interceptors {
 public:
  /// `kernel` is TORCH_FN(function); `operation` is named without "aten::", with its overload after a dot.
  template <class Kernel>
  void add(const char* operation, const Kernel& kernel) {
    const std::string_view full = operation;
    const std::size_t dot = full.find('.');
    const std::string name = c10::str("aten::", full.substr(0, dot));
    const std::string overload(dot == std::string_view::npos ? "" : full.substr(dot + 1));
    const std::lock_guard lock(registration_mutex());
    register_fallthrough();
    const auto handle = c10::Dispatcher::singleton().findSchema({name, overload});
    if (!handle.has_value()) {
      return report(operation, "is unknown to it");
    }
    if (handle->hasKernelForDispatchKey(interception_key)) {
      return;
    }
    try {
      library_.impl(operation, kernel);
    } catch (const c10::Error&) {
      report(operation, "has other arguments there");
    }
  }

  /// The operations that could not be intercepted.
  [[nodiscard]] const std::vector<std::string>& missing() const noexcept { return missing_; }

 private:
  void report(const char* operation, const char* why) {
    missing_.emplace_back(operation);
    TORCH_WARN("microreg leaves aten::", operation, " to this version of LibTorch, since it ", why);
  }

  torch::Library library_{torch::Library::IMPL, "aten", interception_key, __FILE__, __LINE__};
  std::vector<std::string> missing_;
};

/// Includes the key on this thread. c10's own guard restores everything that was included at its beginning, and would
/// leave the key behind where two scopes overlap without one holding the other; this one takes away what it brought.
class Interception {
 public:
  explicit Interception(bool wanted = true)
      : outermost_(wanted && !c10::impl::tls_is_dispatch_key_included(interception_key)) {
    if (outermost_) {
      c10::impl::tls_set_dispatch_key_included(interception_key, true);
    }
  }
  Interception(const Interception&) = delete;
  Interception& operator=(const Interception&) = delete;
  ~Interception() {
    if (outermost_) {
      c10::impl::tls_set_dispatch_key_included(interception_key, false);
    }
  }

 private:
  bool outermost_;
};

/// Sends calls below to the stock kernels.
class StockKernels {
 private:
  c10::impl::ExcludeDispatchKeyGuard guard_{interception_key};
};

/// Whether a tensor is one that our formulas were written for: a dense, real float32 or float64 tensor on the CPU or on
/// CUDA, no subclass, no forward-mode tangent.
inline bool is_plain(const at::Tensor& tensor) {
  if (!tensor.defined()) {
    return true;
  }
  using c10::DispatchKey;
  static const c10::DispatchKeySet special(
      {DispatchKey::Python, DispatchKey::Functionalize, DispatchKey::Conjugate, DispatchKey::Negative});
  return (tensor.is_cpu() || tensor.is_cuda()) && tensor.layout() == at::kStrided &&
         (tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble) &&
         !tensor.key_set().has_any(special) && !tensor._fw_grad(0).defined();
}

/// Whether an intercepted backward operation should be recorded with a formula of ours for its own derivative.
inline bool should_fuse(std::initializer_list<at::Tensor> tensors) {
  // Under a functorch transform no autograd Function may be applied, not even to tensors that are not wrapped.
  if (!at::GradMode::is_enabled() || !at::functorch::getDynamicLayerStack().empty()) {
    return false;
  }
  bool differentiable = false;
  at::ScalarType type = at::ScalarType::Undefined;
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.defined()) {
      continue;
    }
    if (!is_plain(tensor) || (type != at::ScalarType::Undefined && tensor.scalar_type() != type)) {
      return false;
    }
    type = tensor.scalar_type();
    differentiable = differentiable || tensor.requires_grad();
  }
  return differentiable;
}

}  // namespace microreg::detail
