/// @file
/// The step with a penalty, as a user of the library takes it.
#pragma once

#include "workload.hpp"

#include <microreg/report.hpp>

#include <functional>

namespace overhead {

/// A step that zeroes the gradients and fills them with the gradient of loss and penalty.
using PenalisedStep = std::function<microreg::Report()>;

/// The step of `which` on `workload`, with strength 1: the cost does not depend on it, as long as it is above 0.
[[nodiscard]] PenalisedStep make_penalised_step(const Workload& workload, const Case& which);

}  // namespace overhead
