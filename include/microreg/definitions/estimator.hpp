/// @file
/// Definitions of estimator.hpp.
#pragma once

#include <microreg/detail/config.hpp>
#include <microreg/difference.hpp>
#include <microreg/estimator.hpp>
#include <microreg/step/difference_passes.hpp>
#include <microreg/step/differences.hpp>
#include <microreg/step/finite_difference.hpp>

#include <memory>
#include <variant>

namespace microreg::inline MICROREG_ABI::detail {

MICROREG_INLINE std::unique_ptr<Differences> make_differences(const DifferenceRequest& request) {
  const auto make = [&](const auto& chosen, bool central) {
    return std::make_unique<FiniteDifference>(
        DifferenceSettings{chosen.step, chosen.gates, central, chosen.check_every, chosen.tolerance,
                           chosen.own_functions, chosen.displace},
        request);
  };
  if (const auto* forward = std::get_if<ForwardDifference>(&request.estimator)) {
    return make(*forward, false);
  }
  return make(std::get<CentralDifference>(request.estimator), true);
}

}  // namespace microreg::inline MICROREG_ABI::detail
