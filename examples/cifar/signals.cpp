#include "signals.hpp"

namespace cifar {

namespace {
volatile std::sig_atomic_t last_signal = 0;
extern "C" void note_signal(int signal) { last_signal = signal; }
}  // namespace

StopSignals::StopSignals() {
  last_signal = 0;
  struct sigaction action{};
  action.sa_handler = note_signal;
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, &interrupt_);
  sigaction(SIGTERM, &action, &terminate_);
}

StopSignals::~StopSignals() {
  sigaction(SIGINT, &interrupt_, nullptr);
  sigaction(SIGTERM, &terminate_, nullptr);
}

int StopSignals::received() noexcept { return last_signal; }

}  // namespace cifar
