/// @file
/// What the intercepted operations have in common: they record, replay, or leave everything to LibTorch.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/node.h>
#include <microreg/detail/interception.hpp>
#include <microreg/gates/tape.hpp>

#include <initializer_list>
#include <type_traits>
#include <utility>

namespace microreg::detail {

// Visible also where all else is hidden: the kernels are those of the first shared object that registered them.
#if defined(__GNUC__)
__attribute__((visibility("default")))
#endif
inline thread_local GateSession* active_gate_session = nullptr;

/// The session that an operation on these operands belongs to, or null: then it is LibTorch's alone.
///
/// Backward passes are not recorded (their formulas call abs and clamp too), nor what operations that autograd
/// differentiates as a whole call inside (logsumexp subtracts a maximum), nor operations on integers; nothing is under
/// a functorch transform, with a forward-mode tangent or with a tensor subclass.
inline GateSession* gate_session(std::initializer_list<const at::Tensor*> operands) {
  if (active_gate_session == nullptr) {
    return nullptr;
  }
  using c10::DispatchKey;
  static const c10::DispatchKeySet special({DispatchKey::Python, DispatchKey::FuncTorchBatched,
                                            DispatchKey::FuncTorchGradWrapper, DispatchKey::Functionalize,
                                            DispatchKey::Conjugate, DispatchKey::Negative});
  bool floating = false;
  for (const at::Tensor* operand : operands) {
    if (!operand->defined()) {
      continue;
    }
    if (operand->layout() != at::kStrided || operand->is_complex() || operand->key_set().has_any(special) ||
        operand->_fw_grad(0).defined()) {
      return nullptr;
    }
    floating = floating || operand->is_floating_point();
  }
  if (!floating || c10::impl::tls_is_dispatch_key_excluded(DispatchKey::AutogradFunctionality) ||
      c10::impl::tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerFrontMode) ||
      torch::autograd::get_current_node() != nullptr) {
    return nullptr;
  }
  return active_gate_session;
}

/// Runs an operation. `stock()` is LibTorch's, `gates` gives what to record: called before it without arguments, or
/// after it with its result. `replay(gates)` gives what the operation would have given with the pieces of the first
/// pass. None of them is intercepted again.
template <typename Stock, typename Record, typename Replay>
auto gated(const char* operation, std::initializer_list<const at::Tensor*> operands, const Stock& stock,
           const Record& record, const Replay& replay) -> std::invoke_result_t<const Stock&> {
  using Result = std::invoke_result_t<const Stock&>;
  const StockKernels exclude;
  GateSession* const session = gate_session(operands);
  if (session == nullptr) {
    return stock();
  }
  auto sizes = (*operands.begin())->sizes().vec();
  if (session->replays()) {
    return replay(session->next(operation, sizes));
  }
  if constexpr (std::is_invocable_v<const Record&>) {
    Gates gates = record();
    Result result = stock();
    session->record(operation, std::move(sizes), std::move(gates));
    return result;
  } else {
    Result result = stock();
    session->record(operation, std::move(sizes), record(result));
    return result;
  }
}

/// self <- value, differentiable in value. Unlike copy_ it sends no gradient of zeros to the overwritten self.
struct Overwrite : torch::autograd::Function<Overwrite> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, at::Tensor self, const at::Tensor& value) {
    context->mark_dirty({self});
    self.copy_(value);
    return self;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* /*context*/,
                                                 torch::autograd::variable_list upstream) {
    return {at::Tensor(), upstream[0]};
  }
};

inline at::Tensor& overwrite(at::Tensor& self, const at::Tensor& value) {
  Overwrite::apply(self, value);
  return self;
}

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

/// The same for what an operation in place overwrites.
inline at::Tensor overwritten_gate(const at::Tensor& tensor) { return tensor.detach().clone(); }

/// self where `first` was strictly between two bounds, and what the first pass gave elsewhere.
inline at::Tensor replay_between(const at::Tensor& self, const at::Tensor& first, const at::Tensor& first_result,
                                 const at::Scalar& low, const at::Scalar& high) {
  // ATen's fused backward kernels are the fastest way to select, and are differentiable.
  const at::Tensor beyond = first_result - at::hardtanh_backward(first, first, low, high);
  return at::hardtanh_backward(self, first, low, high).add_(beyond);
}

}  // namespace microreg::detail
