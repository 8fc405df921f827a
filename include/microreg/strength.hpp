/// @file
/// The strength of a penalty: a number, or a schedule over steps.
#pragma once

#include <microreg/version.hpp>

#include <concepts>
#include <cstdint>
#include <functional>
#include <type_traits>
#include <utility>

namespace microreg::inline MICROREG_ABI {

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
  /// Throws OptionError for a number that is not finite, or below 0.
  Strength(double constant) : constant_(checked(constant, -1)) {}  // NOLINT(google-explicit-constructor)

  /// Throws OptionError for an empty std::function or a null pointer. The schedule is not called yet.
  template <class Schedule>
    requires(!std::convertible_to<Schedule, double> && !std::same_as<std::remove_cvref_t<Schedule>, Strength> &&
             std::is_invocable_r_v<double, Schedule&, std::int64_t>)
  Strength(Schedule schedule) : schedule_(std::move(schedule)) {  // NOLINT(google-explicit-constructor)
    require_schedule();  // an empty std::function and a null pointer make an empty one
  }

  /// The strength at `step`.
  [[nodiscard]] double at(std::int64_t step) const { return schedule_ ? checked(schedule_(step), step) : constant_; }

  /// The product, step by step.
  [[nodiscard]] friend Strength operator*(const Strength& a, const Strength& b) {
    if (!a.schedule_ && !b.schedule_) {
      return a.constant_ * b.constant_;
    }
    return [a, b](std::int64_t step) { return a.at(step) * b.at(step); };
  }

 private:
  /// Throws OptionError unless there is a function to ask.
  void require_schedule() const;
  /// `value`, if it is one; `step` is -1 for a constant.
  static double checked(double value, std::int64_t step);

  double constant_ = 0;  // beside a schedule, not used
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

  /// `peak` * step / `steps`, and `peak` from `steps` on.
  [[nodiscard]] double operator()(std::int64_t step) const noexcept {
    return step >= steps ? peak : peak * static_cast<double>(step) / static_cast<double>(steps);
  }
};

}  // namespace microreg::inline MICROREG_ABI

#if !defined(MICROREG_COMPILED)
#include <microreg/definitions/strength.hpp>
#endif
