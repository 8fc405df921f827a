/// @file
/// What all copies of these headers in one process know of each other, whatever compiled and loaded them.
///
/// An inline variable is one in the process only where the compiler and the loader make it so: GCC does unless it is
/// told not to, clang does not for what dlopen loads apart, and two versions of these headers have no symbol in common.
/// LibTorch's dispatcher is there once. A notice is an operation "microreg::name(int value=...) -> ()" that nobody
/// calls: what it says is the default of its argument.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/function_schema.h>
#include <ATen/core/jit_type.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>
#include <microreg/version.hpp>

#include <chrono>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// One holder in the process at a time: the dispatcher lets nobody else take the name. It is taken a few times in the
/// life of a process, so those who wait look again and again.
class BoardLock {
 public:
  BoardLock() : taken_(take()) {}

 private:
  static c10::RegistrationHandleRAII take() {
    for (;;) {
      try {
        return c10::Dispatcher::singleton().registerLibrary("microreg_notice_board", "microreg");
      } catch (const c10::Error&) {
        std::this_thread::sleep_for(std::chrono::microseconds(200));
      }
    }
  }

  c10::RegistrationHandleRAII taken_;
};

/// What the notice of this name says, if there is one. With the lock held, as all below.
inline std::optional<c10::IValue> read_notice(const char* name) {
  const auto notice = c10::Dispatcher::singleton().findSchema({std::string("microreg::") + name, ""});
  return notice.has_value() ? notice->schema().arguments().front().default_value() : std::nullopt;
}

/// Pins one to the board, until the process ends.
inline void pin_notice(const char* name, const c10::TypePtr& type, c10::IValue value) {
  std::vector<c10::Argument> arguments;
  arguments.emplace_back("value", type, std::nullopt, std::move(value));
  c10::FunctionSchema schema(std::string("microreg::") + name, "", std::move(arguments), {});
  // Never taken away, not even when static objects end: LibTorch may be gone by then.
  (void)new c10::RegistrationHandleRAII(c10::Dispatcher::singleton().registerDef(std::move(schema), "microreg"));
}

/// Each shared object has one of its own, since no other sees it.
__attribute__((visibility("hidden"))) inline char in_this_object = 0;

/// Keeps the shared object that this code is in loaded, whoever closes it, since LibTorch holds addresses of its
/// functions from now on.
inline void stay_loaded() {
  Dl_info here{};
  if (dladdr(&in_this_object, &here) != 0 && here.dli_fname != nullptr) {
    (void)dlopen(here.dli_fname, RTLD_LAZY | RTLD_NOLOAD | RTLD_NODELETE);
  }
}

}  // namespace microreg::inline MICROREG_ABI::detail
