/// @file
/// What a run says while it goes on: a line that renews itself on a terminal, plain lines in a pipe or file.
#pragma once

#include "records.hpp"

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <string>

namespace cifar {

class Progress {
 public:
  /// Prints to `stream`; to none if it is null.
  explicit Progress(std::FILE* stream = stdout);

  /// A line about the run.
  void say(const std::string& text);
  /// `step` of `steps` is done. Shown on a terminal only, a few times a second; never reads a tensor.
  void step(std::int64_t step, std::int64_t steps);
  void record(const Metrics& metrics, std::int64_t steps);
  void finish(const Summary& summary);

 private:
  using Clock = std::chrono::steady_clock;

  void print(const std::string& text);

  std::FILE* stream_;
  bool terminal_;
  Clock::time_point start_ = Clock::now();
  Clock::time_point shown_{};
  std::string last_record_;
};

}  // namespace cifar
