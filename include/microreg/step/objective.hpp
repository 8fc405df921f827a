/// @file
/// Model, loss and penalties of a user's, behind the interface of a step: all that is compiled anew for each of them.
#pragma once

#include <microreg/any_penalty.hpp>
#include <microreg/autocast.hpp>
#include <microreg/batch.hpp>
#include <microreg/counted_loss.hpp>
#include <microreg/detail/signature.hpp>
#include <microreg/detail/version_of.hpp>
#include <microreg/model.hpp>
#include <microreg/options.hpp>
#include <microreg/step/mini_batch.hpp>

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI {

namespace detail {

/// The concept's message, where a constraint on a template parameter would only say that no function matches.
template <class Input, class Target>
constexpr void assert_batches() {
  static_assert(Batch<Input>,
                "microreg: the input is not a batch: pass a tensor, a tuple, pair, array, vector, optional or map of "
                "batches, or give your type a function microreg_fields(T&) that returns std::tie of its fields");
  static_assert(Batch<Target>,
                "microreg: the target is not a batch: pass a tensor, a tuple, pair, array, vector, optional or map of "
                "batches, or give your type a function microreg_fields(T&) that returns std::tie of its fields");
}

/// The second argument of a loss: a tensor where it takes one, or where nothing is known.
template <class Loss, bool known = Signature<Loss>::known>
struct SecondArgument {
  using type = at::Tensor;
};
template <class Loss>
struct SecondArgument<Loss, true> {
 private:
  template <class Arguments>
  struct Of {
    using type = NoTarget;
  };
  template <class Output, class Target, class... More>
  struct Of<std::tuple<Output, Target, More...>> {
    using type =
        std::conditional_t<std::is_invocable_v<Loss&, Output&, at::Tensor&> && !is_batch<Target>(), at::Tensor, Target>;
  };

 public:
  using type = typename Of<typename Signature<Loss>::Arguments>::type;
};
template <class Loss>
using TargetOf = typename SecondArgument<Loss>::type;

/// What a loss returned: its value, and the other members of what it came in.
struct LossValue {
  at::Tensor value;
  std::vector<at::Tensor> parts = {};
  std::optional<double> count = {};
};

/// sum / count, and the count. Throws ModelError for one that is no number above or at 0.
LossValue mean_of(const CountedLoss& loss);

/// The checked loss of `size` samples, its parts and its count, as the evaluation's own.
void take_loss(Evaluation& evaluation, LossValue loss, Reduction reduction, std::int64_t size);

/// Throws ModelError: `who` would read an output that is no longer the model's.
[[noreturn]] void throw_changed_output(const std::string& who);
/// Throws the same if one of `probes` is another tensor than the loss.
void require_loss_alone(const std::vector<at::Tensor>& probes, const at::Tensor& loss, const std::string& who);

/// The parameters and buffers of a loss that is a module, behind those of the model.
void add_parameters_of_loss(const torch::nn::Module& loss, std::vector<NamedParameter>& parameters);
void add_buffers_of_loss(const torch::nn::Module& loss, std::vector<at::Tensor>& buffers);

template <class Value>
LossValue loss_value(Value&& value) {
  if constexpr (std::is_convertible_v<Value, at::Tensor>) {
    return {std::forward<Value>(value)};
  } else if constexpr (std::is_same_v<std::remove_cvref_t<Value>, CountedLoss>) {
    return mean_of(value);
  } else {
    LossValue result;
    bool first = true;
    for_each_tensor(value, "loss", [&](const at::Tensor& tensor, const std::string& path) {
      if (std::exchange(first, false)) {
        result.value = tensor;
      } else if (tensor.defined()) {
        result.parts.push_back(tensor.detach());
      } else {
        throw ModelError(text({path, " is an undefined tensor; return a value for each part of the loss"}));
      }
    });
    return result;
  }
}

template <class Value>
concept LossResult = std::convertible_to<Value, at::Tensor> || std::same_as<std::remove_cvref_t<Value>, CountedLoss> ||
                     (Batch<Value> && !is_plain_value<std::remove_cvref_t<Value>>);

template <class Loss, class Output, class Target>
concept TakesOutput = std::same_as<Target, NoTarget> && requires(Loss& loss, Output& output) {
  { loss(output) } -> LossResult;
};
template <class Loss, class Output, class Target>
concept TakesTarget = (!std::same_as<Target, NoTarget>) && requires(Loss& loss, Output& output, Target& target) {
  { loss(output, target) } -> LossResult;
};

/// Called where the user's line is on the compiler's way, which a virtual function is not.
template <class Loss, class Output, class Target>
constexpr void assert_loss() {
  static_assert(TakesTarget<Loss, Output, Target> || TakesOutput<Loss, Output, Target>,
                "microreg: the loss cannot be called as loss(output, target) with what the model returns and the "
                "target batch, or it does not return a torch::Tensor, alone or as the first member of a tuple; a "
                "function with default arguments goes into a lambda, and a loss without a target makes a "
                "Regularizer<Input, microreg::NoTarget>");
}

template <class Loss, class Output, class Target>
LossValue call_loss(Loss& loss, Output& output, Target& target) {
  if constexpr (TakesTarget<Loss, Output, Target>) {
    return loss_value(loss(output, target));
  } else if constexpr (TakesOutput<Loss, Output, Target>) {
    return loss_value(loss(output));
  } else {
    return {};  // refused by assert_loss()
  }
}

/// The Autocast that the options ask for, if they do, on the device of the parameters.
class OptionalAutocast {
 public:
  OptionalAutocast(const std::optional<at::ScalarType>& type, c10::DeviceType device) {
    if (type.has_value()) {
      guard_.emplace(device, *type);
    }
  }

 private:
  std::optional<Autocast> guard_;
};

/// The objective of one Regularizer on batches of these types.
template <class Input, class Target>
class Objective : public std::enable_shared_from_this<Objective<Input, Target>> {
 public:
  Objective() = default;
  Objective(const Objective&) = delete;
  Objective& operator=(const Objective&) = delete;
  virtual ~Objective() = default;

  [[nodiscard]] virtual std::vector<NamedParameter> parameters() const = 0;
  [[nodiscard]] virtual std::vector<at::Tensor> buffers() const = 0;
  /// Of each module of model and loss, as far as they are known, whether it is in training mode.
  [[nodiscard]] virtual std::vector<bool> modes() const = 0;
  [[nodiscard]] virtual std::size_t terms() const = 0;
  [[nodiscard]] virtual const TermInfo& term(std::size_t index) const = 0;
  [[nodiscard]] virtual std::unique_ptr<Evaluation> evaluate(Input input, Target target, std::int64_t size,
                                                             const RegularizerOptions& options) = 0;
};

/// What a forward pass returned, kept for the probes.
template <class Input, class Output, class Target>
class PassEvaluation final : public Evaluation {
 public:
  using Penalty = AnyPenalty<Input, Output, Target>;

  PassEvaluation(const Penalty& penalty, const RegularizerOptions& options, Input input, Output output, Target target)
      : penalty_(penalty),
        options_(options),
        input_(std::move(input)),
        output_(std::move(output)),
        target_(std::move(target)) {}

  [[nodiscard]] std::vector<at::Tensor> probes(std::size_t term, Draws* draws) const override {
    const OptionalAutocast half(options_.autocast, loss.device().type());
    auto result = penalty_.terms()[term].probes({input_, output_, target_, loss, options_.generator, draws});
    if (output_was_changed_) {
      require_loss_alone(result, loss, penalty_.terms()[term].name);
    }
    return result;
  }

  Output& output() noexcept { return output_; }
  Target& target() noexcept { return target_; }

  /// How often LibTorch has counted a write in place to what the model returned.
  [[nodiscard]] std::uint64_t output_version() {
    std::uint64_t sum = 0;
    if constexpr (Batch<Output>) {
      for_each_tensor(output_, "output",
                      [&](const at::Tensor& tensor, const std::string& /*path*/) { sum += version_of(tensor); });
    }
    return sum;
  }
  /// To be called after the loss. A probe of another output than the model's would be another penalty.
  void compare_output_version(std::uint64_t before) {
    output_was_changed_ = output_version() != before;
    if (output_was_changed_ && options_.keep_outputs) {
      throw_changed_output("the option keep_outputs");
    }
  }

 private:
  const Penalty& penalty_;
  const RegularizerOptions& options_;
  Input input_;
  Output output_;
  Target target_;
  bool output_was_changed_ = false;
};

template <class Handle, class Loss, class Input, class Target>
class TypedObjective final : public Objective<Input, Target> {
 public:
  using Output = std::remove_cvref_t<decltype(std::declval<Handle&>().forward(std::declval<Input&>()))>;
  using Penalty = AnyPenalty<Input, Output, Target>;

  TypedObjective(Handle handle, Loss loss, Penalty penalty)
      : handle_(std::move(handle)), loss_(std::move(loss)), penalty_(std::move(penalty)) {}

  [[nodiscard]] std::vector<NamedParameter> parameters() const override {
    std::vector<NamedParameter> result = handle_.parameters();
    if constexpr (is_module_holder<Loss>) {
      add_parameters_of_loss(*loss_.ptr(), result);
    }
    return result;
  }
  [[nodiscard]] std::vector<at::Tensor> buffers() const override {
    std::vector<at::Tensor> result = handle_.buffers();
    if constexpr (is_module_holder<Loss>) {
      add_buffers_of_loss(*loss_.ptr(), result);
    }
    return result;
  }
  [[nodiscard]] std::vector<bool> modes() const override {
    std::vector<bool> result;
    handle_.add_modes(result);
    if constexpr (is_module_holder<Loss>) {
      add_modes_of(*loss_.ptr(), result);
    }
    return result;
  }
  [[nodiscard]] std::size_t terms() const override { return penalty_.size(); }
  [[nodiscard]] const TermInfo& term(std::size_t index) const override { return penalty_.terms()[index]; }

  [[nodiscard]] std::unique_ptr<Evaluation> evaluate(Input input, Target target, std::int64_t size,
                                                     const RegularizerOptions& options) override {
    Output output = handle_.forward(input);
    if constexpr (is_tensor<Output>) {
      check_output(output);
    }
    auto result = std::make_unique<PassEvaluation<Input, Output, Target>>(penalty_, options, std::move(input),
                                                                          std::move(output), std::move(target));
    const std::uint64_t version = result->output_version();
    LossValue loss = call_loss(loss_, result->output(), result->target());
    result->compare_output_version(version);
    take_loss(*result, std::move(loss), options.reduction, size);
    if constexpr (Batch<Output>) {
      if (options.keep_outputs) {
        for_each_tensor(result->output(), "output", [&](const at::Tensor& tensor, const std::string& /*path*/) {
          result->outputs.push_back(tensor.detach());
        });
      }
    }
    return result;
  }

 private:
  Handle handle_;
  Loss loss_;
  Penalty penalty_;
};

template <class Input, class Target, class M, class Loss, class Expression>
auto make_objective(M&& model, Loss loss, Expression penalty) {
  assert_batches<Input, Target>();
  using Handle = HandleFor<M>;
  using Typed = TypedObjective<Handle, Loss, Input, Target>;
  assert_loss<Loss, typename Typed::Output, Target>();
  return std::make_shared<Typed>(make_handle(std::forward<M>(model)), std::move(loss),
                                 as_any_penalty<Input, typename Typed::Output, Target>(std::move(penalty)));
}

/// What stands behind a mini-batch that lives on its own.
template <class Input, class Target>
struct OwnBatch {
  std::shared_ptr<Objective<Input, Target>> objective;
  RegularizerOptions options;
  Input input;
  Target target;
};
template <class Input, class Target>
class StandingBatch;

/// Throws ModelError: `name` holds more than tensors, which a recording would not see change.
[[noreturn]] void throw_not_recorded(const std::string& name);

/// An objective on one mini-batch.
template <class Input, class Target>
class ObjectiveOnBatch : public MiniBatch {
 public:
  ObjectiveOnBatch(Objective<Input, Target>& objective, const RegularizerOptions& options, const Input& input,
                   const Target& target, SnapshotMemory* memory = nullptr)
      : objective_(objective), options_(options), input_(input), target_(target), memory_(memory) {
    for (std::size_t i = 0; i < objective.terms(); ++i) {
      input_gradient_ = input_gradient_ || objective.term(i).by_input;
    }
    if (options.autocast.has_value()) {
      const std::vector<NamedParameter> parameters = objective.parameters();
      device_ = parameters.empty() ? device_ : parameters.front().tensor.device().type();
    }
  }

  [[nodiscard]] std::vector<NamedParameter> parameters() const override { return objective_.parameters(); }
  [[nodiscard]] std::vector<at::Tensor> buffers() const override { return objective_.buffers(); }
  [[nodiscard]] SnapshotMemory* memory() override { return memory_; }
  [[nodiscard]] std::size_t terms() const override { return objective_.terms(); }
  [[nodiscard]] const TermInfo& term(std::size_t index) const override { return objective_.term(index); }

  [[nodiscard]] std::vector<Part> parts() const override {
    const std::int64_t inputs = sample_count(input_, "input");
    if constexpr (std::is_same_v<Target, NoTarget>) {
      return cut(inputs, -1, options_);
    } else {
      return cut(inputs, sample_count(target_, "target"), options_);
    }
  }

  void for_each_tensor(const std::function<void(const at::Tensor&, const std::string&)>& visit) const override {
    const auto visit_all = [&](auto batch, const std::string& name) {
      for_each_part(batch, name, [&]<class Leaf>(const Leaf& leaf, const std::string& path) {
        if constexpr (is_tensor<Leaf> && !std::is_base_of_v<Whole, Leaf> && !std::is_base_of_v<OnHost, Leaf>) {
          visit(leaf, path);
        } else if constexpr (IsPerSample<Leaf>::value) {
          detail::for_each_tensor(leaf, path, visit);
        }
      });
    };
    visit_all(input_, "input");
    visit_all(target_, "target");
  }

  [[nodiscard]] std::unique_ptr<Evaluation> evaluate(const Part& part, const std::vector<at::Tensor>& inputs) override {
    Input input = slice(input_, part.begin, part.size);
    std::vector<at::Tensor> differentiable;
    if (input_gradient_) {
      for_each_part(input, "input", []<class Leaf>(const Leaf& /*leaf*/, const std::string& path) {
        if constexpr (!is_tensor<Leaf> && !IsPerSample<Leaf>::value && !is_value_list<Leaf>) {
          throw ModelError(text({path,
                                 " cannot be looked into, to differentiate by the tensors in it: give its type "
                                 "microreg_fields instead of microreg_slice, or pass a PerSample"}));
        }
      });
      // Leaves of the graph, as views: the user's own tensors are left alone.
      detail::for_each_tensor(input, "input", [&](at::Tensor& tensor, const std::string& /*path*/) {
        if (!tensor.is_floating_point() && !tensor.requires_grad()) {
          return;
        }
        if (!inputs.empty()) {
          tensor = inputs[differentiable.size()];
        } else if (!tensor.requires_grad()) {
          tensor = tensor.detach().requires_grad_(true);
        }
        differentiable.push_back(tensor);
      });
    }
    Target target = slice(target_, part.begin, part.size);
    bool shares_graph = false;
    const auto look = [&](const at::Tensor& tensor, const std::string& /*path*/) {
      shares_graph = shares_graph || (tensor.defined() && tensor.grad_fn() != nullptr);
    };
    detail::for_each_tensor(input, "input", look);
    detail::for_each_tensor(target, "target", look);
    const OptionalAutocast half(options_.autocast, device_);
    auto result = objective_.evaluate(std::move(input), std::move(target), part.size, options_);
    result->inputs = std::move(differentiable);
    result->shares_graph = shares_graph;
    return result;
  }

  [[nodiscard]] RecordingTraits traits() const override {
    return {&objective_, objective_.modes(), options_.micro_batch_size, options_.generator};
  }
  void for_each_tensor_of(const Part& part,
                          const std::function<void(const at::Tensor&, const std::string&)>& visit) const override {
    Input input = slice(input_, part.begin, part.size);
    detail::for_each_tensor(input, "input", visit);
    Target target = slice(target_, part.begin, part.size);
    detail::for_each_tensor(target, "target", visit);
  }
  [[nodiscard]] std::unique_ptr<MiniBatch> copied(const Part& part) const override {
    if constexpr (!holds_tensors_alone<Input>()) {
      throw_not_recorded("the input");
    } else if constexpr (!holds_tensors_alone<Target>() && !std::is_same_v<Target, NoTarget>) {
      throw_not_recorded("the target");
    } else {
      OwnBatch<Input, Target> own{objective_.shared_from_this(), options_, slice(input_, part.begin, part.size),
                                  slice(target_, part.begin, part.size)};
      own.options.cuda_graph = nullptr;  // which will own it
      own.options.communicator = nullptr;
      const auto copy = [](at::Tensor& tensor, const std::string& /*path*/) {
        tensor = tensor.detach().clone().requires_grad_(tensor.requires_grad());
      };
      detail::for_each_tensor(own.input, "input", copy);
      detail::for_each_tensor(own.target, "target", copy);
      return std::make_unique<StandingBatch<Input, Target>>(std::move(own));
    }
  }

 private:
  Objective<Input, Target>& objective_;
  const RegularizerOptions& options_;
  const Input& input_;
  const Target& target_;
  SnapshotMemory* memory_;
  bool input_gradient_ = false;
  c10::DeviceType device_ = c10::kCPU;
};

/// A mini-batch that owns what it is made of.
template <class Input, class Target>
class StandingBatch final : private OwnBatch<Input, Target>, public ObjectiveOnBatch<Input, Target> {
 public:
  explicit StandingBatch(OwnBatch<Input, Target> own)
      : OwnBatch<Input, Target>(std::move(own)),
        ObjectiveOnBatch<Input, Target>(*this->objective, this->options, this->input, this->target) {}
};

/// What `look` finds on one mini-batch with an objective of its own.
template <class Found, class M, class Loss, class PenaltyOrSum, class Input, class Target>
Found on_one_batch(M&& model, Loss loss, PenaltyOrSum penalty, const Input& input, const Target& target,
                   const RegularizerOptions& options, Found (*look)(MiniBatch&, const RegularizerOptions&)) {
  using Inputs = Owned<Input>;  // of std::tie, a tuple of values
  using Targets = Owned<Target>;
  const auto objective = make_objective<Inputs, Targets>(std::forward<M>(model), std::move(loss), std::move(penalty));
  const Inputs& inputs = input;
  const Targets& targets = target;
  ObjectiveOnBatch<Inputs, Targets> batch(*objective, options, inputs, targets);
  return look(batch, options);
}

#if defined(MICROREG_COMPILED)
// Of tensors, as most are.
extern template class Objective<at::Tensor, at::Tensor>;
extern template class PassEvaluation<at::Tensor, at::Tensor, at::Tensor>;
extern template class ObjectiveOnBatch<at::Tensor, at::Tensor>;
extern template class StandingBatch<at::Tensor, at::Tensor>;
#endif

}  // namespace detail

}  // namespace microreg::inline MICROREG_ABI

#if !defined(MICROREG_COMPILED)
#include <microreg/definitions/objective.hpp>
#endif
