/// @file
/// Definitions of strength.hpp.
#pragma once

#include <microreg/detail/config.hpp>
#include <microreg/detail/finite.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/strength.hpp>

namespace microreg::inline MICROREG_ABI {

MICROREG_INLINE void Strength::require_schedule() const {
  if (!schedule_) {
    throw OptionError("strength is an empty function; assign the schedule first, or pass a number");
  }
}

MICROREG_INLINE double Strength::checked(double value, std::int64_t step) {
  if (!detail::is_finite(value) || value < 0) {
    throw OptionError(detail::text({"strength", step < 0 ? "" : detail::text({" at step ", step}), " is ", value,
                                    "; it must be a finite number, at least 0"}));
  }
  return value;
}

}  // namespace microreg::inline MICROREG_ABI
