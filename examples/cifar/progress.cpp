#include "progress.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>

namespace cifar {

namespace {
constexpr const char* erase_line = "\r\033[K";
}

Progress::Progress(std::FILE* stream) : stream_(stream), terminal_(stream != nullptr && isatty(fileno(stream)) != 0) {}

void Progress::print(const std::string& text) {
  if (stream_ != nullptr) {
    std::fputs(text.c_str(), stream_);
    std::fflush(stream_);
  }
}

void Progress::say(const std::string& text) { print((terminal_ ? erase_line : "") + text + "\n"); }

void Progress::step(std::int64_t step, std::int64_t steps) {
  const auto now = Clock::now();
  if (step == 1) {
    start_ = now;  // The first step warms up; the forecast begins behind it.
  }
  if (!terminal_ || step < 2 || now - shown_ < std::chrono::milliseconds(200)) {
    return;
  }
  shown_ = now;
  const double per_step = std::chrono::duration<double>(now - start_).count() / static_cast<double>(step - 1);
  const std::int64_t width = 24;
  const auto filled = static_cast<std::size_t>(width * step / steps);
  print(fmt::format("{}[{}{}] {}/{}, {:.0f} s left{}", erase_line, std::string(filled, '='),
                    std::string(static_cast<std::size_t>(width) - filled, ' '), step, steps,
                    per_step * static_cast<double>(steps - step), last_record_));
}

void Progress::record(const Metrics& metrics, std::int64_t steps) {
  last_record_ = fmt::format(", loss {:.3f}, accuracy {:.1f} %", metrics.train_loss, 100 * metrics.accuracy);
  say(
      fmt::format("step {:>{}}/{}  loss {:<7.4f}  accuracy {:5.2f} %  micro-batch gradient norm {:<8.4g}  penalty "
                  "{:<8.3g}  {:6.1f} s",
                  metrics.step, fmt::formatted_size("{}", steps), steps, metrics.train_loss, 100 * metrics.accuracy,
                  metrics.micro_batch_gradient_norm, metrics.penalty, metrics.seconds));
}

void Progress::finish(const Summary& summary) {
  say(fmt::format(
      "{} after {} steps in {:.1f} s ({:.0f} ms a step): best accuracy {:.2f} % at step {}, final {:.2f} %{}",
      summary.status, summary.steps, summary.seconds, 1000 * summary.seconds_per_step, 100 * summary.best_accuracy,
      summary.best_step, 100 * summary.final_accuracy,
      summary.test_accuracy.has_value()
          ? fmt::format("; on the test images the best has {:.2f} %", 100 * *summary.test_accuracy)
          : ""));
}

}  // namespace cifar
