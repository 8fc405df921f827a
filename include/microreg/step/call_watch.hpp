/// @file
/// Being told of every operation that is called on this thread.
#pragma once

#include <ATen/core/ivalue.h>
#include <ATen/record_function.h>
#include <c10/util/ArrayRef.h>
#include <microreg/version.hpp>

#include <memory>
#include <optional>
#include <utility>

namespace microreg::inline MICROREG_ABI::detail {

/// What an operation was called with. RecordFunction::inputs() asserts in a program that is compiled without NDEBUG, by
/// a flag that the code inside of LibTorch's releases never sets; LibTorch swallows what a callback throws, so nothing
/// would be seen, and nothing said. Hence the member itself, through the one door that the language leaves open.
inline c10::ArrayRef<const c10::IValue> inputs_of(const at::RecordFunction& function);

template <auto member>
struct RecordedInputs {
  friend c10::ArrayRef<const c10::IValue> inputs_of(const at::RecordFunction& function) { return function.*member; }
};
template struct RecordedInputs<&at::RecordFunction::inputs_>;

/// While it lives and is `wanted`, Watch::note(const at::RecordFunction&) is called for each operation on this thread,
/// and note_end() after it. Of two of a kind the inner one is told. A thread that has taken over this one's
/// thread-local state tells it too while a Here lives there; Watch has to be safe to call from several then.
template <class Watch>
class CallWatch {
 public:
  class Here {
   public:
    explicit Here(Watch& watch) : before_(std::exchange(current(), watch.handle_.has_value() ? &watch : nullptr)) {}
    Here(const Here&) = delete;
    Here& operator=(const Here&) = delete;
    ~Here() { current() = before_; }

   private:
    Watch* before_;
  };

  CallWatch(const CallWatch&) = delete;
  CallWatch& operator=(const CallWatch&) = delete;

 protected:
  /// While it lives, nobody is told on this thread.
  class Unwatched {
   public:
    Unwatched() : before_(std::exchange(current(), nullptr)) {}
    Unwatched(const Unwatched&) = delete;
    Unwatched& operator=(const Unwatched&) = delete;
    ~Unwatched() { current() = before_; }

   private:
    Watch* before_;
  };

  static Watch*& current() {
    thread_local Watch* one = nullptr;
    return one;
  }

  explicit CallWatch(bool wanted) {
    if (wanted) {
      before_ = current();
      current() = static_cast<Watch*>(this);
      handle_ = at::addThreadLocalCallback(at::RecordFunctionCallback(&tell, &tell_end)
                                               .needsInputs(Watch::needs_inputs)
                                               .scopes({at::RecordScope::FUNCTION}));
    }
  }
  static constexpr bool needs_inputs = true;
  void note_end(const at::RecordFunction& /*function*/) {}

  ~CallWatch() {
    if (handle_.has_value()) {
      at::removeCallback(*handle_);
      current() = before_;
    }
  }

 private:
  static std::unique_ptr<at::ObserverContext> tell(const at::RecordFunction& function) {
    if (current() != nullptr) {
      current()->note(function);
    }
    return nullptr;
  }
  static void tell_end(const at::RecordFunction& function, at::ObserverContext* /*context*/) {
    if (current() != nullptr) {
      current()->note_end(function);
    }
  }

  std::optional<at::CallbackHandle> handle_;
  Watch* before_ = nullptr;
};

}  // namespace microreg::inline MICROREG_ABI::detail
