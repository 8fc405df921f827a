/// @file
/// Puts the kernels with gates on the key that the scopes include.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/jit_type.h>
#include <c10/util/Exception.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/interceptors.hpp>
#include <microreg/detail/notice_board.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/gates/activations.hpp>
#include <microreg/gates/arithmetic.hpp>
#include <microreg/gates/clamp.hpp>
#include <microreg/gates/constants.hpp>
#include <microreg/gates/decisions.hpp>
#include <microreg/gates/draws.hpp>
#include <microreg/gates/extrema.hpp>
#include <microreg/gates/losses.hpp>
#include <microreg/gates/normalisations.hpp>
#include <microreg/gates/pooling.hpp>
#include <microreg/gates/refused.hpp>
#include <microreg/gates/tape.hpp>
#include <microreg/gates/watched.hpp>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail::gating {

/// One intercepted operation. It takes its arguments as the dispatcher's stack has them: LibTorch holds the code that
/// puts them there, so a kernel brings no template instances.
class GateKernel final : public c10::OperatorKernel {
 public:
  GateKernel(std::function<void(Call&)> kernel, bool draws) : kernel_(std::move(kernel)), draws_(draws) {}

  void operator()(const c10::OperatorHandle& operation, c10::DispatchKeySet /*keys*/, torch::jit::Stack* stack) {
    if (draws_ ? draws_are_active() : gates_are_active()) {
      Call call(operation, *stack, *active_gate_session);
      if (draws_ || has_gates(call.in)) {
        return kernel_(call);
      }
    }
    const StockKernels exclude;
    operation.callBoxed(*stack);
  }

 private:
  std::function<void(Call&)> kernel_;
  bool draws_;
};

/// Registers the kernels, once per process: another shared object that includes this header finds them there, and the
/// variable that they look at. An operation that this LibTorch does not have, or has with other arguments, runs as it
/// is: that is said once, by name.
class Registration {
 public:
  Registration() {
    const Registering registering;
    if (const auto found = read_notice(session_notice)) {
      slot_ = reinterpret_cast<SessionSlot>(found->toInt());
      return;
    }
    add_draws();  // before the rule for rrelu, which draws in training mode
    add_rules(activations);
    add_rules(clamps);
    add_rules(extrema);
    add_rules(poolings);
    add_rules(arithmetic);
    add_rules(losses);
    for (const Refused& rule : refused) {
      add_with_in_place(rule.operation, nullptr, [&rule](Call& call) { refuse(rule, call); });
    }
    add_all(decisions, [](Call& call) { decide(call); });
    add_all(readings, read);
    add_all(steps, step);
    add_all(selections, select);
    add_all({"detach"}, hold);
    add_all(with_constants, hold_constants);
    add_with_in_place("_to_copy", nullptr, convert);
    add_with_in_place("max_pool1d", nullptr, max_pool1d);
    for (const Normalisation& each : normalisations) {
      const std::string name = full_name(each.operation);
      const auto fits = [](const c10::FunctionSchema&) { return true; };
      Interceptors::report(name, kernels_.add(name, fits, std::make_unique<NormalisationKernel>(each)));
    }
    pin_notice(session_notice, c10::IntType::get(), reinterpret_cast<std::int64_t>(slot_));
  }

  /// This thread's session, as the registered kernels see it.
  [[nodiscard]] GateSession*& session() const { return *slot_(); }

 private:
  using Kernel = std::function<void(Call&)>;

  void add_draws() {
    for (const char* operation : drawn_results) {
      add_draw(operation, draw);
    }
    for (const char* operation : drawn_in_place) {
      add_draw(operation, draw_in_place);
    }
    for (const char* operation : drawn_inside) {
      add_draw(operation, draw_inside);
    }
    add_draw("native_dropout", native_dropout);
    add_draw("embedding_renorm_", project_once);
    add_draw("rrelu_with_noise", rrelu);
    add_draw("rrelu_with_noise_", rrelu);
  }
  /// What this LibTorch does not have is left out: the devices' own operations come and go.
  void add_draw(const std::string& operation, const Kernel& kernel) {
    Interceptors::report_if_there(full_name(operation), add(operation, nullptr, kernel, true));
  }

  template <std::size_t N>
  void add_rules(const Rule (&rules)[N]) {
    for (const Rule& rule : rules) {
      add_with_in_place(rule.operation, rule.arguments, [&rule](Call& call) { apply(rule, call); });
    }
  }
  template <std::size_t N>
  void add_all(const char* const (&operations)[N], const Kernel& kernel) {
    for (const char* operation : operations) {
      add_with_in_place(operation, nullptr, kernel);
    }
  }

  /// Registers an operation, and its form in place if there is one with the same arguments.
  void add_with_in_place(const std::string& operation, const char* arguments, const Kernel& kernel) {
    std::string in_place = operation;
    in_place.insert(std::min(operation.find('.'), operation.size()), 1, '_');
    Interceptors::report_if_there(full_name(in_place), add(in_place, arguments, kernel));  // most have none
    Interceptors::report(full_name(operation), add(operation, arguments, kernel));
  }

  const char* add(const std::string& operation, const char* arguments, const Kernel& kernel, bool draws = false) {
    const auto fits = [&](const c10::FunctionSchema& schema) {
      return arguments == nullptr || arguments_of(schema) == arguments;
    };
    return kernels_.add(full_name(operation), fits, std::make_unique<GateKernel>(kernel, draws));
  }

  static std::string full_name(const std::string& operation) { return text({"aten::", operation}); }

  static std::string arguments_of(const c10::FunctionSchema& schema) {
    std::string result;
    for (const c10::Argument& argument : schema.arguments()) {
      result += (result.empty() ? "" : ", ") + argument.type()->str() + ' ' + argument.name();
    }
    return result;
  }

  SessionSlot slot_ = [] { return &active_gate_session; };
  Interceptors kernels_;
};

}  // namespace microreg::inline MICROREG_ABI::detail::gating

namespace microreg::inline MICROREG_ABI::detail {

MICROREG_INLINE GateSession*& gate_session_of_kernels() {
  static const gating::Registration registration;
  return registration.session();
}

}  // namespace microreg::inline MICROREG_ABI::detail
