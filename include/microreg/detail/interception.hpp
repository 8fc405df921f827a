/// @file
/// How a scope gets between autograd and LibTorch's kernels: functions registered on a dispatch key that nothing else
/// uses and that falls through for every other operation. The key is included per thread by the scope; the autograd
/// engine carries it into its worker threads. Nothing of LibTorch is overridden, and the stock kernel stays reachable
/// by excluding the key.
#pragma once

#include <c10/core/DispatchKey.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <microreg/version.hpp>

#include <utility>

namespace microreg::inline MICROREG_ABI::detail {

inline constexpr c10::DispatchKey interception_key = c10::DispatchKey::TESTING_ONLY_GenericMode;

/// Whether a scope is open on this thread.
inline bool is_intercepting() { return c10::impl::tls_is_dispatch_key_included(interception_key); }

/// Includes the key on this thread. c10's own guard restores everything that was included at its beginning, and would
/// leave the key behind where two scopes overlap without one holding the other; this one takes away what it brought. So
/// does an InferenceMode that began in a scope and ends after it; the next scope takes that away with what it brings.
class Interception {
 public:
  explicit Interception(bool wanted = true)
      : outermost_(wanted && (!is_intercepting() || std::exchange(stale(), false))),
        inference_(c10::InferenceMode::is_enabled()) {
    if (outermost_) {
      c10::impl::tls_set_dispatch_key_included(interception_key, true);
    }
  }
  Interception(const Interception&) = delete;
  Interception& operator=(const Interception&) = delete;
  ~Interception() {
    if (outermost_) {
      c10::impl::tls_set_dispatch_key_included(interception_key, false);
      stale() = c10::InferenceMode::is_enabled() && !inference_;
    }
  }

 private:
  /// Whether the key will come back on this thread without a scope.
  static bool& stale() {
    thread_local bool one = false;
    return one;
  }

  bool outermost_;
  bool inference_;
};

/// Sends calls below to the stock kernels.
class StockKernels {
 private:
  c10::impl::ExcludeDispatchKeyGuard guard_{interception_key};
};

}  // namespace microreg::inline MICROREG_ABI::detail
