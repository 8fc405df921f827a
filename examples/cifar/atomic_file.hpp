/// @file
/// Files that are either the old or the new one, whatever happens in between.
#pragma once

#include <filesystem>
#include <string_view>

namespace cifar {

/// Replaces `path` by a file that holds `bytes`: written beside it under the name `path` + ".tmp", brought to disk,
/// then renamed. A process that is killed, or a disk that is full, leaves the old file. Throws std::runtime_error,
/// naming file, reason and remedy, if something cannot be written.
void replace_file(const std::filesystem::path& path, std::string_view bytes);

/// Brings what was written to `path` to disk. Throws as replace_file.
void sync_file(const std::filesystem::path& path);

/// Throws std::runtime_error: `path` cannot be written, for this reason.
[[noreturn]] void fail_to_write(const std::filesystem::path& path, std::string_view reason);

}  // namespace cifar
