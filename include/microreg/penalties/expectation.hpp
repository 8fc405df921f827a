/// @file
/// What penalties with random draws have in common: how their expectation is taken.
#pragma once

#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>

#include <cstdint>
#include <string_view>

namespace microreg::inline MICROREG_ABI {

/// How a penalty that is defined as an expectation is evaluated.
enum class Expectation {
  sampled,  ///< the mean over independent draws: cheap, noisy, unbiased
  exact,    ///< the expectation itself, with as many probes as it takes
};

namespace detail {
/// Throws OptionError unless `count`, the option called `field`, is at least 1.
inline void check_count(std::int64_t count, std::string_view field) {
  if (count < 1) {
    throw OptionError(text({field, " is ", count, "; it must be at least 1"}));
  }
}
}  // namespace detail

}  // namespace microreg::inline MICROREG_ABI
