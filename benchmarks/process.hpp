/// @file
/// This program, run once more.
#pragma once

#include <string>
#include <vector>

namespace overhead {

/// Runs this program with other arguments and returns what it printed. Throws if it fails.
[[nodiscard]] std::string run_this_program(const std::vector<std::string>& arguments);

}  // namespace overhead
