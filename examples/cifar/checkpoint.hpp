/// @file
/// Checkpoints: files that a run can go on from, also after a crash in the middle of writing one.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace cifar {

/// A checkpoint that is there, but cannot be used.
class CheckpointError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The last two checkpoints of a run, in its folder: `checkpoint.ckpt` and `checkpoint.previous.ckpt`. Each has a
/// header with its step, size and checksum. What it holds is up to the caller.
class Checkpoints {
 public:
  struct Loaded {
    std::filesystem::path path;
    std::int64_t step = 0;
    std::string bytes;
  };

  explicit Checkpoints(std::filesystem::path folder) : folder_(std::move(folder)) {}

  [[nodiscard]] std::filesystem::path last() const { return folder_ / "checkpoint.ckpt"; }
  [[nodiscard]] std::filesystem::path previous() const { return folder_ / "checkpoint.previous.ckpt"; }
  /// Where a checkpoint is between being whole and being the last one.
  [[nodiscard]] std::filesystem::path next() const { return folder_ / "checkpoint.next.ckpt"; }

  /// Writes the checkpoint after `step` updates; the last one becomes the previous one. Atomic, see replace_file.
  void save(std::int64_t step, std::string_view bytes) const;

  /// The newest checkpoint that is whole; none if there is none at all. A damaged one is named in `notes`, with what is
  /// wrong and which one is taken instead. Throws CheckpointError if all that are there are damaged.
  [[nodiscard]] std::optional<Loaded> load(std::vector<std::string>& notes) const;

  void remove() const;

 private:
  std::filesystem::path folder_;
};

}  // namespace cifar
