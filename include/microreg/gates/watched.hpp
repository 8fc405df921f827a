/// @file
/// Whether somebody on this thread wants to see all operations with gates.
#pragma once

#include <ATen/core/ivalue.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <microreg/detail/interception.hpp>
#include <microreg/detail/notice_board.hpp>
#include <microreg/gates/tape.hpp>

#include <cstdint>

namespace microreg::inline MICROREG_ABI::detail {

/// Where a thread's session is, for the kernels that are registered, and the notice that says it to other objects.
using SessionSlot = GateSession** (*)();
inline constexpr const char* session_notice = "gate_session";

/// Whether gates are recorded or replayed on this thread, by a scope of this shared object or of another one. Registers
/// nothing.
inline bool gates_are_watched() {
  if (!c10::impl::tls_is_dispatch_key_included(interception_key)) {
    return false;
  }
  const BoardLock lock;
  const auto slot = read_notice(session_notice);
  return slot.has_value() && *reinterpret_cast<SessionSlot>(slot->toInt())() != nullptr;
}

}  // namespace microreg::inline MICROREG_ABI::detail
