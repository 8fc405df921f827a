/// @file
/// The strength of a penalty: a number, or a schedule over steps.
#pragma once

#include <c10/util/StringUtil.h>
#include <microreg/error.hpp>

#include <cmath>
#include <concepts>
#include <cstdint>
#include <functional>
#include <limits>
#include <type_traits>
#include <utility>

namespace microreg {

/// A factor on a penalty, constant or a function of the step (counted from 0). It converts from a number and from any
/// callable `double(std::int64_t step)`. Every value must be finite and at least 0: OptionError otherwise, for a
/// constant at construction, for a schedule at the step that gave it.
///
/// ```cpp
/// microreg::Strength constant = 0.01;
/// microreg::Strength schedule = [](std::int64_t step) { return step < 100 ? 0.0 : 0.01; };
/// ```
class Strength {
 public:
  Strength(double constant) : constant_(checked(constant, "")) {}  // NOLINT(google-explicit-constructor)

  template <class Schedule>
    requires(!std::convertible_to<Schedule, double> && !std::same_as<std::remove_cvref_t<Schedule>, Strength> &&
             std::is_invocable_r_v<double, Schedule&, std::int64_t>)
  Strength(Schedule schedule) : schedule_(std::move(schedule)) {}  // NOLINT(google-explicit-constructor)

  /// The strength at `step`.
  [[nodiscard]] double at(std::int64_t step) const {
    return schedule_ ? checked(schedule_(step), c10::str(" at step ", step)) : constant_;
  }

 private:
  static double checked(double value, const std::string& when) {
    if (!std::isfinite(value) || value < 0) {
      throw OptionError(c10::str("strength", when, " is ", value, "; it must be a finite number, at least 0"));
    }
    return value;
  }

  double constant_ = std::numeric_limits<double>::quiet_NaN();
  std::function<double(std::int64_t)> schedule_;
};

/// Linear warm-up: 0 at step 0, `peak` from step `steps` on.
///
/// ```cpp
/// options.strength = microreg::LinearWarmUp{.peak = 0.01, .steps = 500};
/// ```
struct LinearWarmUp {
  double peak = 1.0;         ///< the strength once warm
  std::int64_t steps = 100;  ///< how many steps it takes; 0 or less means warm at once

  [[nodiscard]] double operator()(std::int64_t step) const noexcept {
    return step >= steps ? peak : peak * static_cast<double>(step) / static_cast<double>(steps);
  }
};

}  // namespace microreg
