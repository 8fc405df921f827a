/// @file
/// What the intercepted operations have in common: they record, replay, or leave everything to LibTorch.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/tensor.h>
#include <microreg/detail/interception.hpp>
#include <microreg/gates/tape.hpp>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

/// What the intercepted operations are made of.
namespace microreg::inline MICROREG_ABI::detail::gating {

/// The arguments of an intercepted call.
class Arguments {
 public:
  Arguments(const c10::FunctionSchema& schema, const torch::jit::Stack& stack)
      : schema_(schema), values_(stack.end() - static_cast<std::ptrdiff_t>(schema.arguments().size()), stack.end()) {}

  [[nodiscard]] const at::Tensor& tensor(std::size_t i) const { return values_[i].toTensor(); }
  [[nodiscard]] at::Scalar scalar(std::size_t i) const { return values_[i].toScalar(); }
  [[nodiscard]] std::int64_t integer(std::size_t i) const { return values_[i].toInt(); }
  /// Not by the Scalar's own function, which under -ffast-math refuses infinity.
  [[nodiscard]] double number(std::size_t i) const {
    return values_[i].isDouble() ? values_[i].toDouble() : scalar(i).toDouble();
  }
  [[nodiscard]] bool flag(std::size_t i) const { return values_[i].toBool(); }
  [[nodiscard]] std::vector<std::int64_t> integers(std::size_t i) const { return values_[i].toIntVector(); }
  [[nodiscard]] std::string_view text(std::size_t i) const { return values_[i].toStringView(); }
  [[nodiscard]] bool given(std::size_t i) const {
    return !values_[i].isNone() && !(values_[i].isTensor() && !values_[i].toTensor().defined());
  }
  [[nodiscard]] std::optional<double> maybe_number(std::size_t i) const {
    return given(i) ? std::optional(number(i)) : std::nullopt;
  }
  [[nodiscard]] std::optional<at::Tensor> maybe_tensor(std::size_t i) const {
    return given(i) ? std::optional(tensor(i)) : std::nullopt;
  }
  /// The same without the first operand, which would keep its graph alive.
  [[nodiscard]] Arguments without_operand() const {
    Arguments result = *this;
    result.values_.front() = c10::IValue();
    return result;
  }
  /// The position of an argument, if there is one of that name.
  [[nodiscard]] std::optional<std::size_t> find(const char* name) const {
    const auto index = schema_.argumentIndexWithName(name);
    return index.has_value() ? std::optional(static_cast<std::size_t>(*index)) : std::nullopt;
  }

  [[nodiscard]] const std::vector<c10::IValue>& values() const noexcept { return values_; }
  /// The operation's name without namespace and overload.
  [[nodiscard]] const char* operation() const { return schema_.name().c_str() + std::string_view("aten::").size(); }
  [[nodiscard]] bool in_place() const { return schema_.name().back() == '_'; }
  [[nodiscard]] std::vector<std::int64_t> sizes() const {
    for (const c10::IValue& value : values_) {
      if (value.isTensor() && value.toTensor().defined()) {
        return value.toTensor().sizes().vec();
      }
    }
    return {};
  }
  [[nodiscard]] bool requires_grad() const {
    return any([](const at::Tensor& tensor) { return tensor.requires_grad(); });
  }
  template <class Predicate>
  [[nodiscard]] bool any(const Predicate& predicate) const {
    for (const c10::IValue& value : values_) {
      if (value.isTensor() && value.toTensor().defined() && predicate(value.toTensor())) {
        return true;
      }
      if (value.isTensorList()) {
        for (const at::Tensor& tensor : value.toTensorVector()) {
          if (tensor.defined() && predicate(tensor)) {
            return true;
          }
        }
      }
    }
    return false;
  }

 private:
  const c10::FunctionSchema& schema_;
  std::vector<c10::IValue> values_;
};

/// Whether random numbers that are drawn on this thread belong to a session now: also those that an operation draws
/// inside, but not a backward pass's.
inline bool draws_are_active() {
  using c10::DispatchKey;
  return active_gate_session != nullptr &&
         !c10::impl::tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         torch::autograd::get_current_node() == nullptr;
}

/// Whether decisions of forward passes on this thread belong to a session now.
///
/// Backward passes do not (their formulas call abs and clamp too), nor what operations that autograd differentiates as
/// a whole call inside (logsumexp subtracts a maximum), nor anything under a functorch transform.
inline bool gates_are_active() {
  return draws_are_active() && active_gate_session->holds_decisions() &&
         !c10::impl::tls_is_dispatch_key_excluded(c10::DispatchKey::AutogradFunctionality);
}

/// Whether operations on these operands have gates: not on integers alone, and not with a forward-mode tangent or a
/// tensor subclass.
inline bool has_gates(const Arguments& in) {
  using c10::DispatchKey;
  static const c10::DispatchKeySet special({DispatchKey::Python, DispatchKey::FuncTorchBatched,
                                            DispatchKey::FuncTorchGradWrapper, DispatchKey::Functionalize,
                                            DispatchKey::Conjugate, DispatchKey::Negative});
  return in.any([](const at::Tensor& tensor) { return tensor.is_floating_point(); }) &&
         !in.any([](const at::Tensor& tensor) {
           return tensor.layout() != at::kStrided || tensor.is_complex() || tensor.key_set().has_any(special) ||
                  tensor._fw_grad(0).defined();
         });
}

/// An intercepted call in a session.
class InterceptedCall {
 public:
  InterceptedCall(const c10::OperatorHandle& operation, torch::jit::Stack& stack, GateSession& of)
      : in(operation.schema(), stack), session(of), operation_(operation), stack_(stack) {}

  const Arguments in;
  GateSession& session;

  /// LibTorch's operation, nothing of which is intercepted.
  void stock() {
    const StockKernels exclude;
    operation_.callBoxed(stack_);
  }
  /// What it returned.
  [[nodiscard]] std::vector<c10::IValue> results() const {
    return {stack_.end() - static_cast<std::ptrdiff_t>(operation_.schema().returns().size()), stack_.end()};
  }
  [[nodiscard]] c10::TypeKind returned() const { return operation_.schema().returns().front().type()->kind(); }
  /// Returns these instead of calling it.
  void give(std::vector<c10::IValue> results) {
    torch::jit::drop(stack_, in.values().size());
    stack_.insert(stack_.end(), std::make_move_iterator(results.begin()), std::make_move_iterator(results.end()));
  }
  /// Hands it another argument.
  void replace(std::size_t position, c10::IValue value) {
    stack_[stack_.size() - in.values().size() + position] = std::move(value);
  }
  void record(GateTensors gates, bool may_be_left_out, bool drawn = false) {
    const auto [node, number] = node_of(results().front());
    session.record({in.operation(), in.sizes(), std::move(gates), {}, may_be_left_out, node, number, drawn});
  }
  GateTensors next() { return session.next(in.operation(), in.sizes()); }

 private:
  /// The node of a result. What is written to a view lies within a node of its base.
  static std::pair<const void*, std::uint64_t> node_of(const c10::IValue& result) {
    if (!result.isTensor() || !result.toTensor().requires_grad()) {
      return {nullptr, 0};
    }
    const at::Tensor& tensor = result.toTensor();
    const auto function = tensor.is_view() ? tensor._base().grad_fn() : tensor.grad_fn();
    const torch::autograd::Node* node = function.get();
    if (const auto* slices = dynamic_cast<const torch::autograd::CopySlices*>(node)) {
      node = slices->fn.get();
    }
    return {node, node == nullptr ? 0 : node->sequence_nr()};
  }

  const c10::OperatorHandle& operation_;
  torch::jit::Stack& stack_;
};

/// Whether autograd keeps a tensor that an operation's own gradient asks for, and would notice if it were overwritten
/// while the tape needs it. Not so parameters and their views: they move between the passes.
inline bool autograd_keeps(const at::Tensor& tensor) {
  return at::GradMode::is_enabled() && tensor.requires_grad() && !tensor.is_leaf() &&
         !(tensor.is_view() && tensor._base().is_leaf());
}

/// The sign of a tensor that the operation's gradient asks for: itself, at no cost, if autograd keeps it, else the mask
/// of its positive elements. Either is on where it is positive.
inline at::Tensor positive_gate(const at::Tensor& tensor) {
  return autograd_keeps(tensor) ? tensor.detach() : tensor.gt(0);
}

/// The same, where values are asked for: else a copy.
inline at::Tensor value_gate(const at::Tensor& tensor) {
  return autograd_keeps(tensor) ? tensor.detach() : tensor.detach().clone();
}

// The same for the first operand, which an operation in place overwrites.

inline at::Tensor positive_gate(const Arguments& in) {
  return in.in_place() ? in.tensor(0).gt(0) : positive_gate(in.tensor(0));
}

inline at::Tensor value_gate(const Arguments& in) {
  return in.in_place() ? in.tensor(0).detach().clone() : value_gate(in.tensor(0));
}

}  // namespace microreg::inline MICROREG_ABI::detail::gating
