/// @file
/// Where a step on a CUDA device spends its time.
#pragma once

#include "case.hpp"

namespace overhead {

/// Prints, for the plain and for the penalised step of a case, how long the device worked in all and in each kind of
/// kernel, the longest first. Throws std::invalid_argument where the case is not on CUDA.
void print_kernel_times(const Case& which);

}  // namespace overhead
