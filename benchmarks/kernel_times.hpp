/// @file
/// Where a step spends its time.
#pragma once

#include "case.hpp"

namespace overhead {

/// Prints, for the plain and for the penalised step of a case, how long the device worked in all and in each kind of
/// kernel, the longest first. On the CPU it is the operators, each without those that it calls.
void print_kernel_times(const Case& which);

}  // namespace overhead
