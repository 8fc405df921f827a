/// @file
/// The command line.
#pragma once

#include "options.hpp"

#include <optional>

namespace cifar {

/// The options asked for, with the defaults of the method filled in; empty if --help or --version was asked for and
/// printed. Throws UsageError.
[[nodiscard]] std::optional<Options> parse_command_line(int argc, const char* const* argv);

}  // namespace cifar
