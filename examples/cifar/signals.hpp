/// @file
/// SIGINT and SIGTERM as a wish to stop after the step.
#pragma once

#include <csignal>

namespace cifar {

/// While it lives, the first SIGINT or SIGTERM is only noted; a second one of the same kind ends the process as usual,
/// unless it comes within a second: `timeout` sends its signal to the process and once more to its group, launchers
/// hand on what a terminal has sent to all.
class StopSignals {
 public:
  StopSignals();
  StopSignals(const StopSignals&) = delete;
  StopSignals& operator=(const StopSignals&) = delete;
  ~StopSignals();

  /// The signal that came since the last StopSignals was made, 0 if none did.
  [[nodiscard]] static int received() noexcept;

 private:
  struct sigaction interrupt_{};
  struct sigaction terminate_{};
};

}  // namespace cifar
