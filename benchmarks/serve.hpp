/// @file
/// The persistent mode that peers/compare.py alternates with steps of its own.
#pragma once

#include "case.hpp"

#include <iosfwd>
#include <string>

namespace overhead {

/// Writes weights and data to `state` (unless empty), prints "ready", then takes one order a line until the input ends:
/// "plain" and "penalised" each take one step and print its milliseconds, the mean loss, and the norm of the gradient
/// that the step left behind.
void serve(const Case& which, const std::string& state, std::istream& orders);

}  // namespace overhead
