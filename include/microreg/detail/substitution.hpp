/// @file
/// Tensors that stand for others in all operations of a thread, while the others stay what they are for every other
/// one.
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/jit_type.h>
#include <ATen/core/stack.h>
#include <c10/core/DispatchKey.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/interceptors.hpp>
#include <microreg/detail/notice_board.hpp>
#include <microreg/error.hpp>

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// Another key that nothing uses, below that of the gates: what these hand on is substituted too.
inline constexpr c10::DispatchKey substitution_key = c10::DispatchKey::TESTING_ONLY_GenericWrapper;

using SubstituteTensors = std::unordered_map<const c10::TensorImpl*, at::Tensor>;

inline thread_local const SubstituteTensors* active_substitutes = nullptr;

/// An argument with the substitutes in place of what they stand for, in lists too.
inline void substitute(c10::IValue& value, const SubstituteTensors& substitutes) {
  if (value.isTensor()) {
    if (const auto found = substitutes.find(value.toTensor().unsafeGetTensorImpl()); found != substitutes.end()) {
      value = found->second;
    }
  } else if (value.isList()) {
    const c10::List<c10::IValue> list = value.toList();
    c10::List<c10::IValue> copy = list;
    for (std::size_t i = 0; i < list.size(); ++i) {
      c10::IValue element = list.get(i);
      if (!element.isTensor() || !substitutes.contains(element.toTensor().unsafeGetTensorImpl())) {
        continue;
      }
      if (copy.is(list)) {
        copy = list.copy();
        value = copy;
      }
      substitute(element, substitutes);
      copy.set(i, std::move(element));
    }
  }
}

/// What every operation goes through on a thread with substitutes.
inline void call_substituted(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard once(substitution_key);
  if (active_substitutes != nullptr) {
    const std::size_t count = operation.schema().arguments().size();
    for (auto value = stack->end() - static_cast<std::ptrdiff_t>(count); value != stack->end(); ++value) {
      substitute(*value, *active_substitutes);
    }
  }
  operation.callBoxed(*stack);
}

/// Registers that, once a process: another shared object uses what the first has registered.
class SubstitutionKernel {
 public:
  using Slot = const SubstituteTensors** (*)();

  SubstitutionKernel() {
    const Registering registering;
    constexpr const char* notice = "substitutes";
    if (const auto found = read_notice(notice)) {
      slot_ = reinterpret_cast<Slot>(found->toInt());
      return;
    }
    if (c10::Dispatcher::singleton().hasBackendFallbackForDispatchKey(substitution_key)) {
      throw Error(
          "somebody else in this process uses the dispatch key that Displace::copies needs; leave .displace at "
          "Displace::parameters");
    }
    static torch::Library library(torch::Library::IMPL, "_", substitution_key, __FILE__, __LINE__);
    library.fallback(torch::CppFunction::makeFromBoxedFunction<&call_substituted>());
    pin_notice(notice, c10::IntType::get(), reinterpret_cast<std::int64_t>(slot_));
  }

  /// This thread's substitutes, as the registered kernel sees them.
  [[nodiscard]] const SubstituteTensors*& active() const { return *slot_(); }

 private:
  Slot slot_ = [] { return &active_substitutes; };
};

/// While it lives, operations of this thread see others[i] in place of tensors[i]. They nest: what stood for
/// others before goes on doing so.
class Substitution {
 public:
  Substitution(const std::vector<at::Tensor>& tensors, const std::vector<at::Tensor>& others)
      : active_(slot()), before_(active_) {
    if (before_ != nullptr) {
      substitutes_ = *before_;
    }
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      if (!others[i].is_same(tensors[i])) {
        substitutes_.insert_or_assign(tensors[i].unsafeGetTensorImpl(), others[i]);
      }
    }
    active_ = &substitutes_;
    c10::impl::tls_set_dispatch_key_included(substitution_key, true);
  }
  Substitution(const Substitution&) = delete;
  Substitution& operator=(const Substitution&) = delete;
  ~Substitution() {
    c10::impl::tls_set_dispatch_key_included(substitution_key, before_ != nullptr);
    active_ = before_;
    at::autocast::clear_cache();  // which would keep copies of what stood for parameters
  }

 private:
  static const SubstituteTensors*& slot() {
    static const SubstitutionKernel kernel;
    return kernel.active();
  }

  const SubstituteTensors*& active_;
  const SubstituteTensors* before_;
  SubstituteTensors substitutes_;
};

}  // namespace microreg::inline MICROREG_ABI::detail
