#include "signals.hpp"

#include <atomic>
#include <ctime>

namespace cifar {

namespace {
constexpr long long one_signal_sent_twice = 1'000'000'000;  // nanoseconds

// When the first came, on the monotonic clock; 0 until then.
std::atomic<long long> interrupted = 0;
std::atomic<long long> terminated = 0;
volatile std::sig_atomic_t last_signal = 0;
static_assert(std::atomic<long long>::is_always_lock_free);  // a signal's handler may not wait

extern "C" void note_signal(int signal) {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  const long long time = now.tv_sec * 1'000'000'000LL + now.tv_nsec;
  long long first = 0;
  auto& noted = signal == SIGINT ? interrupted : terminated;
  if (noted.compare_exchange_strong(first, time)) {
    last_signal = signal;
  } else if (time - first >= one_signal_sent_twice) {
    std::signal(signal, SIG_DFL);
    std::raise(signal);  // comes when this handler has returned
  }
}
}  // namespace

StopSignals::StopSignals() {
  last_signal = 0;
  interrupted = terminated = 0;
  struct sigaction action{};
  action.sa_handler = note_signal;
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
