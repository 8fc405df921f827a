/// @file
/// The machine: what state it is in, and how memory is taken from it.
#pragma once

#include <optional>
#include <string>

namespace overhead {

/// Keeps freed memory in the process instead of handing it back to the kernel. By default glibc maps every large tensor
/// freshly, and a step then spends much of its time on page faults. Returns false where the C library has no such
/// knobs.
bool keep_freed_memory();

/// Maps every tensor above 128 KiB on its own, so that the resident set is what is alive. Left alone, glibc raises that
/// threshold with the sizes that it sees freed, puts large tensors into its heap, and the resident set then depends on
/// the holes between them. Does nothing where the C library has no such knob.
void map_large_tensors();

/// The average number of running processes over the last minute.
[[nodiscard]] std::optional<double> load_average();

/// The processor's name, or "unknown processor".
[[nodiscard]] std::string processor_name();

}  // namespace overhead
