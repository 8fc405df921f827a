/// @file
/// Definitions of autocast.hpp.
#pragma once

#include <ATen/autocast_mode.h>
#include <microreg/autocast.hpp>
#include <microreg/detail/config.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>

namespace microreg::inline MICROREG_ABI {

MICROREG_INLINE Autocast::Autocast(c10::DeviceType device, at::ScalarType type)
    : device_(device),
      was_enabled_(at::autocast::is_autocast_enabled(device)),
      type_before_(at::autocast::get_autocast_dtype(device)) {
  if (type != at::kBFloat16 && type != at::kHalf) {
    throw OptionError(detail::text({"the type of Autocast is ", type, "; it must be BFloat16 or Half"}));
  }
  at::autocast::set_autocast_enabled(device, true);
  at::autocast::set_autocast_dtype(device, type);
  at::autocast::increment_nesting();
}

MICROREG_INLINE Autocast::~Autocast() {
  // The copies of weights that it keeps are of these weights: the next scope may find others.
  if (at::autocast::decrement_nesting() == 0) {
    at::autocast::clear_cache();
  }
  at::autocast::set_autocast_dtype(device_, type_before_);
  at::autocast::set_autocast_enabled(device_, was_enabled_);
}

}  // namespace microreg::inline MICROREG_ABI
