/// @file
/// Operations with a kink: what a first pass records of one, and what a second pass computes instead.
#pragma once

#include <ATen/ATen.h>
#include <microreg/detail/tensors.hpp>
#include <microreg/gates/history.hpp>
#include <microreg/gates/kernel.hpp>

#include <algorithm>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail::gating {

/// One operation, and its form in place if it has one.
struct KinkedOperation {
  const char* name;    // with its overload after a dot
  const char* schema;  // as is_known() has it
  /// What to record, from the arguments before LibTorch's operation runs or from its results afterwards. Without either
  /// the operations that `replay` calls are recorded by themselves.
  GateTensors (*gates)(const Arguments&);
  GateTensors (*gates_of_results)(const Arguments&, const std::vector<c10::IValue>&);
  /// What the operation would have given with the pieces of the first pass, differentiable. The form in place
  /// overwrites the first operand with it: its gradient must not need that operand then.
  Tensors (*replay)(const Arguments&, const GateTensors&);
  /// Whether there is a kink with these arguments; always, if null.
  bool (*has_kink)(const Arguments&) = nullptr;
  /// The schema of the operation of this name and "_backward", if `replay` calls that one.
  const char* backward = nullptr;

  [[nodiscard]] constexpr bool is_composed() const { return gates == nullptr && gates_of_results == nullptr; }
};

/// An operation composed of ones that have gates.
constexpr KinkedOperation composed(const char* operation, const char* schema,
                                   Tensors (*replay)(const Arguments&, const GateTensors&),
                                   bool (*has_kink)(const Arguments&) = nullptr) {
  return {operation, schema, nullptr, nullptr, replay, has_kink};
}

inline void record_gates(const KinkedOperation& kinked, InterceptedCall& call) {
  GateTensors gates;
  if (kinked.is_composed()) {
    const at::NoGradGuard no_grad;
    const GateSession::Composing composing(call.session);
    kinked.replay(call.in, {});
    gates.push_back(at::empty({0}));  // The operation's own entry, after theirs.
  } else if (kinked.gates != nullptr) {
    const StockKernels exclude;
    gates = kinked.gates(call.in);
  }
  call.stock();
  if (kinked.gates_of_results != nullptr) {
    const StockKernels exclude;
    gates = kinked.gates_of_results(call.in, call.results());
  }
  call.record(std::move(gates), /*may_be_left_out=*/false);
}

/// The result in the layout of the only operand, as LibTorch's operation leaves it. masked_fill() makes a contiguous
/// one of any, and LibTorch takes another way through a linear layer there.
inline at::Tensor laid_out_as_operand(const Arguments& in, const at::Tensor& result) {
  const at::Tensor& operand = in.tensor(0);
  const auto is_other = [&](const c10::IValue& value) { return value.isTensor() && value.toTensor().defined(); };
  if (!operand.is_non_overlapping_and_dense() || result.sizes() != operand.sizes() ||
      result.strides() == operand.strides() || std::count_if(in.values().begin(), in.values().end(), is_other) > 1) {
    return result;
  }
  return at::empty_like(operand, result.options()).copy_(result);
}

inline void replay_gates(const KinkedOperation& kinked, InterceptedCall& call) {
  Tensors results;
  if (kinked.is_composed()) {
    const GateSession::Composing composing(call.session);
    results = kinked.replay(call.in, {});
    call.next();
  } else {
    const StockKernels exclude;
    results = kinked.replay(call.in, call.next());
  }
  if (call.in.in_place()) {
    const StockKernels exclude;
    write_back(call.in.tensor(0), results.front());
    results = {call.in.tensor(0)};
  } else if (results.size() == 1) {
    const StockKernels exclude;
    results.front() = laid_out_as_operand(call.in, results.front());
  }
  call.give({results.begin(), results.end()});
}

inline void freeze(const KinkedOperation& kinked, InterceptedCall& call) {
  if (kinked.has_kink != nullptr && !kinked.has_kink(call.in)) {
    call.stock();
  } else if (call.session.replays()) {
    replay_gates(kinked, call);
  } else {
    record_gates(kinked, call);
  }
}

}  // namespace microreg::inline MICROREG_ABI::detail::gating
