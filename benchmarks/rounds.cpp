#include "rounds.hpp"

#include <algorithm>
#include <chrono>
#include <stdexcept>

namespace overhead {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

double time_ms(const std::function<void()>& step) {
  const auto start = Clock::now();
  step();
  return 1e3 * seconds_since(start);
}

Samples run_rounds(std::span<const std::function<void()>> steps, const Budget& budget) {
  constexpr std::size_t fewest = 3;
  const auto start = Clock::now();
  const auto more = [&](std::size_t done) {
    if (budget.rounds.has_value()) {
      return done < static_cast<std::size_t>(*budget.rounds);
    }
    return done < fewest || seconds_since(start) < budget.seconds;
  };
  Samples samples;
  while (more(samples.size())) {
    std::vector<double> round;
    round.reserve(steps.size());
    for (const auto& step : steps) {
      round.push_back(time_ms(step));
    }
    samples.push_back(std::move(round));
  }
  return samples;
}

double median(std::vector<double> values) {
  if (values.empty()) {
    throw std::invalid_argument("the median of no values");
  }
  std::sort(values.begin(), values.end());
  const std::size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

double median_time(const Samples& samples, std::size_t step) {
  std::vector<double> times;
  for (const auto& round : samples) {
    times.push_back(round[step]);
  }
  return median(std::move(times));
}

double median_ratio(const Samples& samples, std::size_t step, std::size_t reference) {
  std::vector<double> ratios;
  for (const auto& round : samples) {
    ratios.push_back(round[step] / round[reference]);
  }
  return median(std::move(ratios));
}

}  // namespace overhead
