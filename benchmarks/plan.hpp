/// @file
/// Which rows a run measures.
#pragma once

#include "options.hpp"

#include <vector>

namespace overhead {

/// Rows that share a network, its layout, a micro-batch size and a penalty, and are measured together.
using Group = std::vector<Case>;

/// The groups that the options ask for. Without filters: every network, layout and penalty at micro-batch 32, and
/// GradientNorm at micro-batch 128 too. With filters: everything that they allow.
[[nodiscard]] std::vector<Group> make_plan(const Options& options);

}  // namespace overhead
