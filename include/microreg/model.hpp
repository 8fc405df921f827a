/// @file
/// Anything that can be called and has parameters is a model: `ModuleHolder`, `std::shared_ptr` to a module, a plain
/// reference to a `torch::nn::Module` subclass, `AnyModule`, `torch::jit::Module`, or a FunctionModel.
#pragma once

#include <torch/csrc/jit/api/module.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/pimpl.h>
#include <microreg/error.hpp>
#include <microreg/micro_batch.hpp>
#include <microreg/parameters.hpp>

#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace microreg {

/// A plain callable with a list of the parameters it reads, and of the buffers it writes (so that they can be put back
/// after an error).
///
/// ```cpp
/// microreg::FunctionModel model{[&](const torch::Tensor& x) { return torch::addmm(b, x, w); }, {w, b}};
/// ```
template <class Function>
struct FunctionModel {
  Function function;
  std::vector<at::Tensor> parameters;
  std::vector<at::Tensor> buffers = {};
};
template <class Function>
FunctionModel(Function, std::vector<at::Tensor>) -> FunctionModel<Function>;
template <class Function>
FunctionModel(Function, std::vector<at::Tensor>, std::vector<at::Tensor>) -> FunctionModel<Function>;

namespace detail {

/// Calls `function(input)`, or with the elements of a tuple as arguments where it takes those.
template <class Function, class Input>
decltype(auto) call_with(Function&& function, const Input& input) {
  if constexpr (std::is_invocable_v<Function&, const Input&>) {
    return function(input);
  } else if constexpr (TupleLike<Input>) {
    return std::apply(function, input);
  } else {
    static_assert(std::is_invocable_v<Function&, const Input&>,
                  "microreg: the model cannot be called with this input: give it a forward() that takes the input "
                  "batch, or the elements of the tuple as arguments");
  }
}

inline std::vector<NamedParameter> named_parameters_of(const torch::nn::Module& module) {
  std::vector<NamedParameter> result;
  for (const auto& item : module.named_parameters()) {
    result.push_back({item.key(), item.value()});
  }
  return result;
}

/// A module with a statically known forward().
template <class Module>
class ModuleHandle {
 public:
  explicit ModuleHandle(std::shared_ptr<Module> module) : module_(std::move(module)) {
    if (!module_) {
      throw ModelError("the model is an empty holder (nullptr); construct the module before the Regularizer");
    }
  }

  template <class Input>
  decltype(auto) forward(const Input& input) {
    return call_with(
        [this]<class... A>(const A&... arguments) -> decltype(std::declval<Module&>().forward(arguments...)) {
          return module_->forward(arguments...);
        },
        input);
  }
  [[nodiscard]] std::vector<NamedParameter> parameters() const { return named_parameters_of(*module_); }
  [[nodiscard]] std::vector<at::Tensor> buffers() const { return module_->buffers(); }

 private:
  std::shared_ptr<Module> module_;
};

class AnyModuleHandle {
 public:
  explicit AnyModuleHandle(torch::nn::AnyModule module) : module_(std::move(module)) {
    if (module_.is_empty()) {
      throw ModelError("the model is an empty AnyModule; assign a module before constructing the Regularizer");
    }
  }

  template <class Input>
  at::Tensor forward(const Input& input) {
    // AnyModule compares argument types exactly: a tensor must be passed as a Tensor, not as a const Tensor&.
    if constexpr (TupleLike<Input>) {
      return std::apply([this](auto... arguments) { return module_.forward(std::move(arguments)...); }, input);
    } else {
      return module_.forward(Input(input));
    }
  }
  [[nodiscard]] std::vector<NamedParameter> parameters() const { return named_parameters_of(*module_.ptr()); }
  [[nodiscard]] std::vector<at::Tensor> buffers() const { return module_.ptr()->buffers(); }

 private:
  torch::nn::AnyModule module_;
};

class ScriptHandle {
 public:
  explicit ScriptHandle(torch::jit::Module module) : module_(std::move(module)) {}

  template <class Input>
  at::Tensor forward(const Input& input) {
    std::vector<c10::IValue> arguments;
    if constexpr (TupleLike<Input>) {
      std::apply([&](const auto&... argument) { (arguments.emplace_back(argument), ...); }, input);
    } else {
      arguments.emplace_back(input);
    }
    const c10::IValue output = module_.forward(std::move(arguments));
    if (!output.isTensor()) {
      throw ModelError(c10::str("the scripted model returned a ", output.tagKind(),
                                ", a Tensor is needed; wrap it in a FunctionModel that picks the tensor"));
    }
    return output.toTensor();
  }
  [[nodiscard]] std::vector<NamedParameter> parameters() const {
    std::vector<NamedParameter> result;
    for (const auto& item : module_.named_parameters()) {
      result.push_back({item.name, item.value});
    }
    return result;
  }
  [[nodiscard]] std::vector<at::Tensor> buffers() const {
    std::vector<at::Tensor> result;
    for (const auto& buffer : module_.buffers()) {
      result.push_back(buffer);
    }
    return result;
  }

 private:
  torch::jit::Module module_;
};

template <class Function>
class FunctionHandle {
 public:
  explicit FunctionHandle(FunctionModel<Function> model) : model_(std::move(model)) {}

  template <class Input>
  decltype(auto) forward(const Input& input) {
    return call_with(model_.function, input);
  }
  [[nodiscard]] std::vector<NamedParameter> parameters() const {
    std::vector<NamedParameter> result;
    for (std::size_t i = 0; i < model_.parameters.size(); ++i) {
      result.push_back({c10::str("parameters[", i, "]"), model_.parameters[i]});
    }
    return result;
  }
  [[nodiscard]] std::vector<at::Tensor> buffers() const { return model_.buffers; }

 private:
  FunctionModel<Function> model_;
};

template <class T>
struct IsSharedModule : std::false_type {};
template <class T>
struct IsSharedModule<std::shared_ptr<T>> : std::is_base_of<torch::nn::Module, T> {};
template <class T>
struct IsFunctionModel : std::false_type {};
template <class T>
struct IsFunctionModel<FunctionModel<T>> : std::true_type {};

template <class M>
inline constexpr bool is_module_holder = std::is_base_of_v<torch::detail::ModuleHolderIndicator, M>;

template <class M>
inline constexpr bool is_model =
    is_module_holder<M> || std::is_base_of_v<torch::nn::Module, M> || IsSharedModule<M>::value ||
    std::is_same_v<M, torch::nn::AnyModule> || std::is_same_v<M, torch::jit::Module> || IsFunctionModel<M>::value;

/// One interface to every kind of model: forward(input), parameters(), buffers().
template <class M>
auto make_handle(M&& model) {
  using Plain = std::remove_cvref_t<M>;
  static_assert(is_model<Plain>,
                "microreg: this is not a model: pass a module holder, a std::shared_ptr to or a reference to a "
                "torch::nn::Module subclass, an AnyModule, a torch::jit::Module, or a microreg::FunctionModel");
  if constexpr (is_module_holder<Plain>) {
    using Module = typename Plain::ContainedType;
    return ModuleHandle<Module>(model.is_empty() ? nullptr : model.ptr());
  } else if constexpr (IsSharedModule<Plain>::value) {
    return ModuleHandle<typename Plain::element_type>(std::forward<M>(model));
  } else if constexpr (std::is_base_of_v<torch::nn::Module, Plain>) {
    static_assert(std::is_lvalue_reference_v<M> && !std::is_const_v<std::remove_reference_t<M>>,
                  "microreg: a module passed by reference must be a non-const object that outlives the Regularizer");
    // Not owned: the aliasing constructor makes a shared_ptr that never deletes.
    return ModuleHandle<Plain>(std::shared_ptr<Plain>(std::shared_ptr<Plain>(), &model));
  } else if constexpr (std::is_same_v<Plain, torch::nn::AnyModule>) {
    return AnyModuleHandle(std::forward<M>(model));
  } else if constexpr (std::is_same_v<Plain, torch::jit::Module>) {
    return ScriptHandle(std::forward<M>(model));
  } else {
    return FunctionHandle(std::forward<M>(model));
  }
}

template <class M>
using HandleFor = decltype(make_handle(std::declval<M>()));

}  // namespace detail

/// Everything `Regularizer` takes as its first argument.
template <class M>
concept Model = detail::is_model<std::remove_cvref_t<M>>;

}  // namespace microreg
