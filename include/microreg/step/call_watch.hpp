/// @file
/// Being told of every operation that is called on this thread.
#pragma once

#include <ATen/record_function.h>
#include <microreg/version.hpp>

#include <memory>
#include <optional>

namespace microreg::inline MICROREG_ABI::detail {

/// While it lives and is `wanted`, Watch::note(const at::RecordFunction&) is called for each operation on this thread.
/// Of two of a kind the inner one is told.
template <class Watch>
class CallWatch {
 public:
  CallWatch(const CallWatch&) = delete;
  CallWatch& operator=(const CallWatch&) = delete;

 protected:
  explicit CallWatch(bool wanted) {
    if (wanted) {
      before_ = current();
      current() = static_cast<Watch*>(this);
      handle_ = at::addThreadLocalCallback(
          at::RecordFunctionCallback(&tell).needsInputs(true).scopes({at::RecordScope::FUNCTION}));
    }
  }
  ~CallWatch() {
    if (handle_.has_value()) {
      at::removeCallback(*handle_);
      current() = before_;
    }
  }

 private:
  static Watch*& current() {
    thread_local Watch* one = nullptr;
    return one;
  }
  static std::unique_ptr<at::ObserverContext> tell(const at::RecordFunction& function) {
    if (current() != nullptr) {
      current()->note(function);
    }
    return nullptr;
  }

  std::optional<at::CallbackHandle> handle_;
  Watch* before_ = nullptr;
};

}  // namespace microreg::inline MICROREG_ABI::detail
