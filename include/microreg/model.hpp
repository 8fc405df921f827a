/// @file
/// Anything that can be called and has parameters is a model: `ModuleHolder`, `std::shared_ptr` to a module, a plain
/// reference to a `torch::nn::Module` subclass, `AnyModule`, `torch::jit::Module`, or a FunctionModel.
#pragma once

#include <c10/util/Exception.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/pimpl.h>
#include <microreg/batch.hpp>
#include <microreg/detail/signature.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/parameters.hpp>

#include <memory>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI {

/// The parameters and buffers of several modules as those of one; see modules().
class Modules {
 public:
  /// Throws ModelError for a null pointer.
  explicit Modules(std::vector<std::shared_ptr<torch::nn::Module>> modules);

  /// Named after the module's place and their own name: `modules[1].weight`.
  [[nodiscard]] std::vector<NamedParameter> parameters() const;
  [[nodiscard]] std::vector<at::Tensor> buffers() const;  ///< of one module behind the other, submodules included
  /// Adds of each module, and of those in it, whether it is in training mode.
  void add_modes(std::vector<bool>& modes) const;

 private:
  std::vector<std::shared_ptr<torch::nn::Module>> modules_;
};

/// Several module holders or shared pointers to modules, for a FunctionModel or a Penalised over all of them:
///
/// ```cpp
/// microreg::FunctionModel model{[&](const torch::Tensor& x) { return decoder->forward(encoder->forward(x)); },
///                               microreg::modules(encoder, decoder)};
/// ```
template <class... M>
[[nodiscard]] Modules modules(const M&... module) {
  const auto pointer = [](const auto& each) -> std::shared_ptr<torch::nn::Module> {
    if constexpr (std::is_base_of_v<torch::detail::ModuleHolderIndicator, std::remove_cvref_t<decltype(each)>>) {
      return each.ptr();
    } else {
      return each;
    }
  };
  return Modules({pointer(module)...});
}

/// A plain callable with a list of the parameters it reads, and of the buffers it writes (so that they can be put back
/// after an error), or with the modules() that have them.
///
/// ```cpp
/// microreg::FunctionModel model{[&](const torch::Tensor& x) { return torch::addmm(b, x, w); }, {w, b}};
/// ```
template <class Function, class Parameters = std::vector<at::Tensor>>
struct FunctionModel {
  Function function;                     ///< takes the input, or the elements of a tuple as arguments
  Parameters parameters;                 ///< the tensors, named parameters[0], parameters[1], ...; or modules()
  std::vector<at::Tensor> buffers = {};  ///< those it writes to, beside those of modules()
};
template <class Function>
FunctionModel(Function, std::vector<at::Tensor>) -> FunctionModel<Function>;  ///< without buffers
template <class Function>
FunctionModel(Function, std::vector<at::Tensor>, std::vector<at::Tensor>) -> FunctionModel<Function>;  ///< with buffers
template <class Function>
FunctionModel(Function, Modules) -> FunctionModel<Function, Modules>;  ///< with the buffers of modules()

namespace detail {

/// Calls `function(input)`, or with the elements of a tuple as arguments where it takes those. The batch is no
/// constant: functions that take a Tensor& are called too.
template <class Function, class Input>
decltype(auto) call_with(Function&& function, Input& input) {
  if constexpr (std::is_invocable_v<Function&, Input&>) {
    return function(input);
  } else if constexpr (TupleLike<Input>) {
    return std::apply(function, input);
  } else {
    static_assert(std::is_invocable_v<Function&, Input&>,
                  "microreg: the model cannot be called with this input: give it a forward() that takes the input "
                  "batch, or the elements of the tuple as arguments; a function of another name, or with default "
                  "arguments, goes into a FunctionModel, as a lambda");
  }
}

std::vector<NamedParameter> named_parameters_of(const torch::nn::Module& module);
std::vector<NamedParameter> named_parameters_of(const torch::jit::Module& module);
std::vector<NamedParameter> named_parameters_of(const std::vector<at::Tensor>& tensors);
std::vector<at::Tensor> buffers_of(const torch::jit::Module& module);
/// Adds of each module whether it is in training mode.
void add_modes_of(const torch::nn::Module& module, std::vector<bool>& modes);

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
  decltype(auto) forward(Input& input) {
    return call_with([this]<class... A>(A&... arguments) -> decltype(std::declval<Module&>().forward(
                                                             arguments...)) { return module_->forward(arguments...); },
                     input);
  }
  [[nodiscard]] std::vector<NamedParameter> parameters() const { return named_parameters_of(*module_); }
  [[nodiscard]] std::vector<at::Tensor> buffers() const { return module_->buffers(); }
  void add_modes(std::vector<bool>& modes) const { add_modes_of(*module_, modes); }

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
  at::Tensor forward(Input& input) {
    // AnyModule compares argument types exactly: a tensor must be passed as a Tensor, not as a const Tensor&.
    if constexpr (TupleLike<Input>) {
      try {
        return std::apply([this](auto... arguments) { return module_.forward(std::move(arguments)...); }, input);
      } catch (const c10::Error& error) {
        // Said before the module is called: it takes the tuple itself.
        if (std::string_view(error.what()).find("expects 1 argument(s), but received") == std::string_view::npos) {
          throw;
        }
        return module_.forward(Input(input));
      }
    } else {
      return module_.forward(Input(input));
    }
  }
  [[nodiscard]] std::vector<NamedParameter> parameters() const { return named_parameters_of(*module_.ptr()); }
  [[nodiscard]] std::vector<at::Tensor> buffers() const { return module_.ptr()->buffers(); }
  void add_modes(std::vector<bool>& modes) const { add_modes_of(*module_.ptr(), modes); }

 private:
  torch::nn::AnyModule module_;
};

/// A batch as a value of TorchScript: tensors, numbers, strings, and lists, dictionaries, tuples and optionals of
/// those.
template <class T>
c10::IValue as_script_value(const T& value) {
  if constexpr (is_tensor<T>) {
    return at::Tensor(value);
  } else if constexpr (IsMap<T>::value) {
    static_assert(is_tensor<typename T::mapped_type> && std::is_constructible_v<c10::IValue, typename T::key_type>,
                  "microreg: a scripted model takes maps from strings or integers to tensors");
    c10::Dict<typename T::key_type, at::Tensor> result;
    for (const auto& [key, tensor] : value) {
      result.insert(key, tensor);
    }
    return result;
  } else if constexpr (IsVector<T>::value && is_tensor<typename T::value_type>) {
    return c10::List<at::Tensor>(std::vector<at::Tensor>(value.begin(), value.end()));
  } else if constexpr (IsOptional<T>::value) {
    return value.has_value() ? as_script_value(*value) : c10::IValue();
  } else if constexpr (TupleLike<T>) {
    return std::apply(
        [](const auto&... element) {
          return c10::IValue(c10::ivalue::Tuple::create(std::vector<c10::IValue>{as_script_value(element)...}));
        },
        value);
  } else if constexpr (std::is_constructible_v<c10::IValue, const T&>) {
    return c10::IValue(value);
  } else {
    static_assert(std::is_constructible_v<c10::IValue, const T&>,
                  "microreg: a scripted model cannot take this part of the batch: it takes tensors, numbers, strings, "
                  "and std::vector, std::map, std::tuple and std::optional of them; wrap it in a FunctionModel");
  }
}

class ScriptHandle {
 public:
  explicit ScriptHandle(torch::jit::Module module) : module_(std::move(module)) {}

  template <class Input>
  at::Tensor forward(Input& input) {
    std::vector<c10::IValue> arguments;
    if constexpr (TupleLike<Input>) {
      std::apply([&](const auto&... argument) { (arguments.push_back(as_script_value(argument)), ...); }, input);
    } else {
      arguments.push_back(as_script_value(input));
    }
    const c10::IValue output = run(std::move(arguments));
    if (!output.isTensor()) {
      throw ModelError(text({"the scripted model returned a ", output.tagKind(),
                             ", a Tensor is needed; wrap it in a FunctionModel that picks the tensor"}));
    }
    return output.toTensor();
  }
  [[nodiscard]] std::vector<NamedParameter> parameters() const { return named_parameters_of(module_); }
  [[nodiscard]] std::vector<at::Tensor> buffers() const { return buffers_of(module_); }
  void add_modes(std::vector<bool>& modes) const { modes.push_back(module_.is_training()); }

 private:
  /// Of an error of ours, which TorchScript turns into text of its own, it makes one again.
  c10::IValue run(std::vector<c10::IValue> arguments);

  torch::jit::Module module_;
};

template <class Function, class Parameters>
class FunctionHandle {
 public:
  explicit FunctionHandle(FunctionModel<Function, Parameters> model) : model_(std::move(model)) {}

  template <class Input>
  decltype(auto) forward(Input& input) {
    return call_with(model_.function, input);
  }
  [[nodiscard]] std::vector<NamedParameter> parameters() const {
    if constexpr (std::is_same_v<Parameters, Modules>) {
      return model_.parameters.parameters();
    } else {
      return named_parameters_of(model_.parameters);
    }
  }
  [[nodiscard]] std::vector<at::Tensor> buffers() const {
    if constexpr (std::is_same_v<Parameters, Modules>) {
      std::vector<at::Tensor> result = model_.parameters.buffers();
      result.insert(result.end(), model_.buffers.begin(), model_.buffers.end());
      return result;
    } else {
      return model_.buffers;
    }
  }
  void add_modes(std::vector<bool>& modes) const {
    if constexpr (std::is_same_v<Parameters, Modules>) {
      model_.parameters.add_modes(modes);
    }
  }

 private:
  FunctionModel<Function, Parameters> model_;
};

template <class T>
struct IsSharedModule : std::false_type {};
template <class T>
struct IsSharedModule<std::shared_ptr<T>> : std::is_base_of<torch::nn::Module, T> {};
template <class T>
struct IsFunctionModel : std::false_type {};
template <class T, class P>
struct IsFunctionModel<FunctionModel<T, P>> : std::true_type {};

template <class M>
inline constexpr bool is_module_holder = std::is_base_of_v<torch::detail::ModuleHolderIndicator, M>;

template <class M>
inline constexpr bool is_model =
    is_module_holder<M> || std::is_base_of_v<torch::nn::Module, M> || IsSharedModule<M>::value ||
    std::is_same_v<M, torch::nn::AnyModule> || std::is_same_v<M, torch::jit::Module> || IsFunctionModel<M>::value;

/// One interface to every kind of model: forward(input), parameters(), buffers(), add_modes(modes).
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
    static_assert(
        !std::is_same_v<typename Plain::element_type, torch::nn::Module>,
        "microreg: a torch::nn::Module has no forward(): keep the pointer to your own class, or put the module "
        "into an AnyModule, or a lambda that calls it into a FunctionModel");
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

/// The class whose forward() a model calls, or the function.
template <class M>
struct CalledBy {
  using type = M;
};
template <class M>
  requires is_module_holder<M>
struct CalledBy<M> {
  using type = typename M::ContainedType;
};
template <>
struct CalledBy<torch::jit::Module> {
  using type = void;  // its forward() takes a list of anything
};
template <class T>
struct CalledBy<std::shared_ptr<T>> {
  using type = T;
};
template <class T, class P>
struct CalledBy<FunctionModel<T, P>> {
  using type = T;
};

/// The batch that F takes, by its arguments: the one that it has, or, where it can be called with a tensor alone, a
/// tensor, or the tuple of all. A tensor too where nothing is known, or its one argument is no batch.
template <class F, bool known = Signature<F>::known>
struct BatchFor {
  using type = at::Tensor;
};
template <class F>
struct BatchFor<F, true> {
 private:
  template <class All>
  struct Of {
    using type = std::conditional_t<callable_with<F, at::Tensor>, at::Tensor, All>;
  };
  template <class One>
  struct Of<std::tuple<One>> {
    using type = std::conditional_t<callable_with<F, at::Tensor> && !is_batch<One>(), at::Tensor, One>;
  };

 public:
  using type = typename Of<typename Signature<F>::Arguments>::type;
};

/// What a model's forward() takes, as far as its declaration says it.
template <class M>
using InputOf = typename BatchFor<typename CalledBy<std::remove_cvref_t<M>>::type>::type;

}  // namespace detail

/// Everything `Regularizer` takes as its first argument.
template <class M>
concept Model = detail::is_model<std::remove_cvref_t<M>>;

}  // namespace microreg::inline MICROREG_ABI

#if !defined(MICROREG_COMPILED)
#include <microreg/definitions/model.hpp>
#endif
