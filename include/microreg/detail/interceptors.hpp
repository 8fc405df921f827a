/// @file
/// Putting kernels on the interception key, operator by operator.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <torch/library.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/interception.hpp>
#include <microreg/detail/notice_board.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/version.hpp>

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace microreg::inline MICROREG_ABI::detail {

/// Held while kernels are registered, so that no two shared objects of a process register the same one. From the first
/// on, all of them have to be of one version of these headers: the kernels and those who use them know each other's
/// layouts. Throws Error where they are not.
class Registering {
 public:
  Registering() {
    const auto found = read_notice("version");
    auto& dispatcher = c10::Dispatcher::singleton();
    if (found.has_value() ? found->toStringRef() != version
                          : dispatcher.hasBackendFallbackForDispatchKey(interception_key)) {
      throw Error(text({"another version of microreg (", found.has_value() ? found->toStringRef() : "unknown",
                        "; this is ", version,
                        ") has intercepted LibTorch's operations in this process; compile all that is loaded into it "
                        "with one version, or set MICROREG_FUSED=0 in its environment and use Exact"}));
    }
    stay_loaded();
    if (!found.has_value()) {
      pin_notice("version", c10::StringType::get(), std::string(version));
      // Lets every operation for which nothing is registered pass.
      static torch::Library fallback(torch::Library::IMPL, "_", interception_key, __FILE__, __LINE__);
      fallback.fallback(torch::CppFunction::makeFallthrough());
    }
  }

 private:
  BoardLock lock_;
};

/// The operation "aten::name.overload" of this LibTorch, if there is one.
inline std::optional<c10::OperatorHandle> find_operation(std::string_view name) {
  const std::size_t dot = name.find('.');
  const std::string_view overload = dot == std::string_view::npos ? "" : name.substr(dot + 1);
  return c10::Dispatcher::singleton().findSchema({std::string(name.substr(0, dot)), std::string(overload)});
}

/// The same by its whole schema, as LibTorch prints it.
inline std::optional<c10::OperatorHandle> find_schema(std::string_view schema) {
  const auto operation = find_operation(schema.substr(0, schema.find('(')));
  return operation.has_value() && c10::toString(operation->schema()) == schema ? operation : std::nullopt;
}

/// Kernels on the interception key, registered one by one and taken away with the object. An operation that another
/// shared object has intercepted is left to it. One that this LibTorch does not have, has with other arguments or
/// results, or will not have intercepted, runs as it is: report() says that, once, by name.
class Interceptors {
 public:
  /// A functor that gets its arguments boxed; while a Registering lives. Null, or what keeps it from this operation:
  /// `fits(schema)` tells whether arguments and results are those that it was written for.
  template <class Functor, class Fits>
  [[nodiscard]] const char* add(const std::string& operation, const Fits& fits, std::unique_ptr<Functor> functor) {
    const auto handle = find_operation(operation);
    if (!handle.has_value()) {
      return unknown;
    }
    if (!fits(handle->schema())) {
      return "has other arguments there";
    }
    if (!handle->hasKernelForDispatchKey(interception_key)) {
      try {
        library_.impl(operation.c_str(), torch::CppFunction::makeFromBoxedFunctor(std::move(functor)));
      } catch (const c10::Error&) {
        return "lets nobody in front of it";
      }
    }
    return nullptr;
  }

  /// Of an operation that a LibTorch need not have.
  static void report_if_there(const std::string& operation, const char* why) {
    report(operation, why == unknown ? nullptr : why);
  }

  static void report(const std::string& operation, const char* why) {
    if (why != nullptr) {
      TORCH_WARN("microreg leaves ", operation, " to this version of LibTorch, since it ", why);
    }
  }

 private:
  static constexpr char unknown[] = "is unknown to it";  // NOLINT(modernize-avoid-c-arrays): one address

  torch::Library library_{torch::Library::IMPL, "aten", interception_key, __FILE__, __LINE__};
};

}  // namespace microreg::inline MICROREG_ABI::detail
