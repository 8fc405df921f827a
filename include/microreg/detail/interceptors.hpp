/// @file
/// Putting kernels on the interception key, operator by operator.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>
#include <torch/library.h>
#include <microreg/detail/interception.hpp>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace microreg::detail {

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
/// shared object has intercepted is left to it. One that this LibTorch does not have, or has with other arguments, runs
/// as it is: report() says that, once, by name.
class Interceptors {
 public:
  /// A functor that gets its arguments boxed. Null, or what keeps it from this operation: `fits(schema)` tells whether
  /// the arguments are those that it was written for.
  template <class Functor, class Fits>
  [[nodiscard]] const char* add(const std::string& operation, const Fits& fits, std::unique_ptr<Functor> functor) {
    const std::lock_guard lock(registration_mutex());
    register_fallthrough();
    const auto handle = find_operation(operation);
    if (!handle.has_value()) {
      return "is unknown to it";
    }
    if (!fits(handle->schema())) {
      return "has other arguments there";
    }
    if (!handle->hasKernelForDispatchKey(interception_key)) {
      library_.impl(operation.c_str(), torch::CppFunction::makeFromBoxedFunctor(std::move(functor)));
    }
    return nullptr;
  }

  static void report(const std::string& operation, const char* why) {
    if (why != nullptr) {
      TORCH_WARN("microreg leaves ", operation, " to this version of LibTorch, since it ", why);
    }
  }

 private:
  torch::Library library_{torch::Library::IMPL, "aten", interception_key, __FILE__, __LINE__};
};

}  // namespace microreg::detail
