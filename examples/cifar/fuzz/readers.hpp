/// @file
/// What reads files, as functions of the bytes in them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace cifar::fuzz {

/// Hands `bytes` to a reader. It may refuse them by the error that it promises; whatever else it throws is a fault, as
/// is what it returns if that is not what it promises (std::logic_error).
struct Reader {
  std::string_view name;
  void (*read)(std::string_view bytes);
};

void read_images(std::string_view bytes);         // the binary files of CIFAR-10 and CIFAR-100
void read_checkpoint(std::string_view bytes);     // first byte: which checkpoints there are, and whether whole
void read_run_state(std::string_view bytes);      // the contents of a checkpoint; behind an s, one spoiled
void read_norms(std::string_view bytes);          // metrics.jsonl, for external grafting
void read_configuration(std::string_view bytes);  // the config.json of the run to go on with
void read_command_line(std::string_view bytes);   // one argument a line

inline constexpr std::array readers{
    Reader{"images", read_images},
    Reader{"checkpoint", read_checkpoint},
    Reader{"run_state", read_run_state},
    Reader{"norms", read_norms},
    Reader{"configuration", read_configuration},
    Reader{"command_line", read_command_line},
};

}  // namespace cifar::fuzz
