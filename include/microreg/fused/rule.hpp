/// @file
/// How an operation is recorded: one autograd node for all of them, with a rule for each.
///
/// The dispatcher hands over a call as a list of arguments (boxed), LibTorch's own wrappers make that list. So a rule
/// names its operation by its schema alone, and nothing of it is compiled but its formula.
#pragma once

#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/interception.hpp>
#include <microreg/detail/libtorch.hpp>
#include <microreg/detail/plain_tensors.hpp>
#include <microreg/detail/tensors.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <initializer_list>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// Which of up to three gradients are asked for.
using OutputMask = std::array<bool, 3>;

/// One call of an operation: its arguments by their position in the schema.
struct Call {
  c10::OperatorHandle operation;
  std::vector<c10::IValue> arguments;

  /// Undefined where there is none.
  [[nodiscard]] at::Tensor tensor(std::size_t position) const {
    const c10::IValue& argument = arguments[position];
    return argument.isTensor() ? argument.toTensor() : at::Tensor();
  }
  [[nodiscard]] OutputMask mask(std::size_t position) const {
    const auto list = arguments[position].toBoolList();
    return {list[0], list[1], list[2]};
  }
  [[nodiscard]] Call with(std::size_t position, c10::IValue argument) const {
    Call changed = *this;
    changed.arguments[position] = std::move(argument);
    return changed;
  }
  /// What the dispatcher makes of it: on a thread inside a scope, unless StockKernels says otherwise, that is us again.
  [[nodiscard]] Tensors run() const {
    std::vector<c10::IValue> stack = arguments;
    operation.callBoxed(&stack);
    Tensors results;
    for (c10::IValue& result : stack) {
      results.push_back(std::move(result).toTensor());
    }
    return results;
  }
};

/// What is known of an operation. Positions count the arguments of its schema.
struct Rule {
  const char* schema;  ///< as LibTorch prints it; an operation with another one is left to LibTorch
  /// The arguments that it has a derivative by.
  std::initializer_list<std::size_t> inputs;
  /// The tensors that the derivative reads, kept in the graph; it gets no others.
  std::initializer_list<std::size_t> saved;
  /// The gradients of `inputs`, of which `needs` tells the wanted ones, from those of the results, of which at least
  /// one is defined; undefined stands for zero in both. Where gradient mode is on, its results must be differentiable.
  Tensors (*derivative)(const Call& call, const Tensors& upstream, OutputMask needs);
  /// Whether the derivative was written for such arguments, types and devices aside. Null: for all.
  bool (*fits)(const Call& call) = nullptr;
  /// Runs the operation, with a graph or without. Null: as LibTorch does.
  Tensors (*forward)(const Call& call) = nullptr;
  /// The same call with arguments that LibTorch gets right, whether `fits` says so or not; differentiable where
  /// gradient mode is on. Null: it gets all of them right.
  Call (*repaired)(const Call& call) = nullptr;
  /// Only the first result has a derivative; the others are kept for it, as arguments behind those of the schema.
  bool keeps_results = false;
  /// In which type the derivative is taken of half types. What it returns autograd rounds to the type of its input.
  HalfTypes halves = HalfTypes::as_they_are;
};

/// A recorded call. Unlike torch::autograd::Function it has results that may be undefined, as those are that a mask did
/// not ask for.
class Recorded final : public torch::autograd::Node {
 public:
  Recorded(const Rule& rule, const Call& call, const Tensors& results) : rule_(rule), call_(call) {
    for (c10::IValue& argument : call_.arguments) {
      argument = argument.isTensor() ? c10::IValue() : argument;
    }
    for (const std::size_t position : rule.saved) {
      saved_.emplace_back(call.tensor(position), /*is_output=*/false);
    }
    for (const at::Tensor& result : results) {
      saved_.emplace_back(result, /*is_output=*/false);
    }
    torch::autograd::edge_list edges;
    for (const std::size_t position : rule.inputs) {
      const at::Tensor input = call.tensor(position);
      edges.push_back(input.defined() ? torch::autograd::impl::gradient_edge(input) : torch::autograd::Edge());
    }
    set_next_edges(std::move(edges));
  }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& incoming) override {
    const std::lock_guard lock(mutex_);
    torch::autograd::variable_list upstream = std::move(incoming);
    if (std::none_of(upstream.begin(), upstream.end(), [](const at::Tensor& each) { return each.defined(); })) {
      return torch::autograd::variable_list(rule_.inputs.size());
    }
    Call call = call_;
    auto variable = saved_.begin();
    for (const std::size_t position : rule_.saved) {
      call.arguments[position] = (variable++)->unpack();
    }
    for (; variable != saved_.end(); ++variable) {
      call.arguments.emplace_back(variable->unpack());
    }
    OutputMask needs{};
    for (std::size_t i = 0; i < rule_.inputs.size(); ++i) {
      needs[i] = task_should_compute_output(i);
    }
    if (rule_.halves == HalfTypes::widened) {
      std::transform(upstream.begin(), upstream.end(), upstream.begin(), widened);
      for (c10::IValue& argument : call.arguments) {
        argument = argument.isTensor() ? c10::IValue(widened(argument.toTensor())) : argument;
      }
    }
    return rule_.derivative(call, upstream, needs);
  }

  void release_variables() override {
    const std::lock_guard lock(mutex_);
    for (torch::autograd::SavedVariable& variable : saved_) {
      variable.reset_data();
    }
  }

  [[nodiscard]] std::string name() const override { return "microreg::" + call_.operation.operator_name().name; }

 private:
  const Rule& rule_;
  Call call_;  // without tensors
  std::vector<torch::autograd::SavedVariable> saved_;
};

/// Runs a call with arguments that LibTorch gets right, where it `fits` by the rule's own way.
inline Tensors run(const Rule& rule, const Call& call, bool fits) {
  const auto run_one = [&](const Call& right) {
    return fits && rule.forward != nullptr ? rule.forward(right) : right.run();
  };
  return rule.repaired != nullptr ? run_one(rule.repaired(call)) : run_one(call);
}

/// Runs a call so that it can be differentiated by its rule.
inline Tensors record(const Rule& rule, const Call& call) {
  Tensors results;
  {
    const at::NoGradGuard no_graph;
    results = run(rule, call, /*fits=*/true);
  }
  const auto differentiable = results.begin() + (rule.keeps_results ? 1 : static_cast<std::ptrdiff_t>(results.size()));
  const NodePointer node = make_node<Recorded>(rule, call, Tensors(differentiable, results.end()));
  for (auto result = results.begin(); result != differentiable; ++result) {
    // Autograd would refuse a view that was made without a graph, once it is written to in place.
    *result = result->defined() && result->is_view() ? result->detach() : *result;
    torch::autograd::set_history(*result, node);
  }
  return results;
}

/// The kernel of a rule, for Interceptors.
class RuleKernel final : public c10::OperatorKernel {
 public:
  explicit RuleKernel(const Rule& rule) : rule_(rule) {}

  void operator()(const c10::OperatorHandle& operation, c10::DispatchKeySet /*keys*/, torch::jit::Stack* stack) const {
    const StockKernels stock;
    const bool graph = at::GradMode::is_enabled();
    if (!graph && rule_.forward == nullptr && rule_.repaired == nullptr) {
      return operation.callBoxed(stack);
    }
    const auto count = static_cast<std::ptrdiff_t>(operation.schema().arguments().size());
    const Call call{operation, {stack->end() - count, stack->end()}};
    Tensors inputs;
    for (const std::size_t position : rule_.inputs) {
      inputs.push_back(call.tensor(position));
    }
    if (!are_plain(inputs, rule_.halves)) {
      return operation.callBoxed(stack);
    }
    torch::jit::drop(*stack, static_cast<std::size_t>(count));
    const bool fits = rule_.fits == nullptr || rule_.fits(call);
    const bool records = graph && fits && any_requires_grad(inputs);
    for (at::Tensor& result : records ? record(rule_, call) : run(rule_, call, fits)) {
      stack->emplace_back(std::move(result));
    }
  }

 private:
  const Rule& rule_;
};

}  // namespace microreg::inline MICROREG_ABI::detail
