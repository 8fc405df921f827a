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
#include <microreg/gates/constants.hpp>
#include <microreg/gates/decisions.hpp>
#include <microreg/gates/draws.hpp>
#include <microreg/gates/kinked_operation.hpp>
#include <microreg/gates/kinked_operations.hpp>
#include <microreg/gates/normalisations.hpp>
#include <microreg/gates/pooling.hpp>
#include <microreg/gates/refused.hpp>
#include <microreg/gates/schema.hpp>
#include <microreg/gates/tape.hpp>
#include <microreg/gates/watched.hpp>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail::gating {

/// One intercepted operation. It takes its arguments as the dispatcher's stack has them: LibTorch holds the code that
/// puts them there, so a kernel brings no template instances.
class GateKernel final : public c10::OperatorKernel {
 public:
  GateKernel(std::function<void(InterceptedCall&)> kernel, bool draws) : kernel_(std::move(kernel)), draws_(draws) {}

  void operator()(const c10::OperatorHandle& operation, c10::DispatchKeySet /*keys*/, torch::jit::Stack* stack) {
    if (draws_ ? draws_are_active() : gates_are_active()) {
      InterceptedCall call(operation, *stack, *active_gate_session);
      if (draws_ || has_gates(call.in)) {
        return kernel_(call);
      }
    }
    const StockKernels exclude;
    operation.callBoxed(*stack);
  }

 private:
  std::function<void(InterceptedCall&)> kernel_;
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
    for (const std::span<const KinkedOperation> list : kinked_operations) {
      for (const KinkedOperation& kinked : list) {
        add_with_in_place(
            kinked.name, kinked.schema, [&kinked](InterceptedCall& call) { freeze(kinked, call); }, kinked.backward);
      }
    }
    for (const Refused& each : refused) {
      add_with_in_place(each.operation, each.schema, [&each](InterceptedCall& call) { refuse(each, call); });
    }
    add_all(decisions, [](InterceptedCall& call) { decide(call); });
    add_all(readings, read);
    add_all(steps, step);
    add_all(selections, select);
    add_all(cuts, hold);
    add_all(with_constants, hold_constants);
    add_all(conversions, convert);
    add_with_in_place("max_pool1d", max_pool1d_schema, max_pool1d);
    add_draws(drawn_results, draw);
    add_draws(drawn_in_place, draw_in_place);
    add_draws(drawn_inside, draw_inside);
    add_draws(dropouts, native_dropout);
    add_draws(projections, project_once);
    add_draws(rrelus, rrelu);
    for (const Normalisation& each : normalisations) {
      add(each.operation, each.schema, Presence::expected, std::make_unique<NormalisationKernel>(each));
    }
    pin_notice(session_notice, c10::IntType::get(), reinterpret_cast<std::int64_t>(slot_));
  }

  /// This thread's session, as the registered kernels see it.
  [[nodiscard]] GateSession*& session() const { return *slot_(); }

 private:
  using Kernel = std::function<void(InterceptedCall&)>;

  /// Whether every LibTorch that the library is for has an operation.
  enum class Presence { expected, optional };

  template <std::size_t N>
  void add_all(const Operations (&lists)[N], const Kernel& kernel) {
    for (const Operations& list : lists) {
      for (const char* operation : list.names) {
        add_with_in_place(operation, list.schema, kernel);
      }
    }
  }
  /// The devices' own operations come and go.
  template <std::size_t N>
  void add_draws(const Operations (&lists)[N], const Kernel& kernel) {
    for (const Operations& list : lists) {
      for (const char* operation : list.names) {
        add(operation, list.schema, Presence::optional, std::make_unique<GateKernel>(kernel, /*draws=*/true));
      }
    }
  }

  /// Registers an operation, and its form in place if there is one: most have none.
  void add_with_in_place(const std::string& operation, const char* known, const Kernel& kernel,
                         const char* known_backward = nullptr) {
    std::string in_place = operation;
    in_place.insert(std::min(operation.find('.'), operation.size()), 1, '_');
    const auto gated = [&] { return std::make_unique<GateKernel>(kernel, /*draws=*/false); };
    add(in_place, known, Presence::optional, gated(), known_backward);
    add(operation, known, Presence::expected, gated(), known_backward);
  }

  /// The one way in: no kernel gets a call whose arguments or results are other than it knows.
  template <class Functor>
  void add(const std::string& operation, const char* known, Presence presence, std::unique_ptr<Functor> kernel,
           const char* known_backward = nullptr) {
    const std::string name = text({"aten::", operation});
    const auto fits = [&](const c10::FunctionSchema& schema) {
      const auto backward = known_backward == nullptr ? std::nullopt : find_operation(text({name, "_backward"}));
      return is_known(schema, known) &&
             (known_backward == nullptr || (backward.has_value() && is_known(backward->schema(), known_backward)));
    };
    const char* why = kernels_.add(name, fits, std::move(kernel));
    presence == Presence::optional ? Interceptors::report_if_there(name, why) : Interceptors::report(name, why);
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
