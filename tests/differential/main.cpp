// Random networks, batches, layouts, losses, penalties and options: the gradient by every way to differentiate against
// plain double backward by hand in float64. Each case is a function of its seed.
//
//     microreg_differential                          the networks that the tests try
//     microreg_differential --first 1000 --count N   others
//     microreg_differential --first SEED --count 1 --say   one of them, with what it is
//
// Fails, with seed and description, where a gradient is wrong, a report, a running statistic or the random numbers
// differ, or something is changed that must not be. A difference may refuse by an error of ours: how often is printed.
#include "compare.hpp"

#include <fmt/format.h>

#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <numeric>
#include <vector>

#include <unistd.h>
#include <csignal>

namespace {

/// Networks of which a gradient was wrong before it was mended, or a difference refused what is right.
constexpr std::int64_t once_wrong[] = {1209,   100562, 100964, 101858, 102235, 120413, 129633, 137905,
                                       138423, 146420, 155245, 155912, 158629, 202903, 302286};

volatile std::sig_atomic_t current = 0;

/// Says which seed brought the process down.
void died(int signal) {
  char text[64] = "died at seed ";
  std::size_t length = std::strlen(text);
  char digits[24];
  std::size_t count = 0;
  for (long value = current; value > 0 || count == 0; value /= 10) {
    digits[count++] = static_cast<char>('0' + value % 10);
  }
  while (count > 0) {
    text[length++] = digits[--count];
  }
  text[length++] = '\n';
  const ssize_t written = write(STDERR_FILENO, text, length);
  (void)written;
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

void print(const char* what, const std::map<std::string, std::int64_t>& counts) {
  for (const auto& [why, count] : counts) {
    fmt::print("{} {}: {}\n", what, count, why);
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::int64_t first = 1, count = 900;
  bool say = false;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--say") {
      say = true;
    } else if (i + 1 < argc && argument == "--first") {
      first = std::atoll(argv[++i]);
    } else if (i + 1 < argc && argument == "--count") {
      count = std::atoll(argv[++i]);
    } else {
      fmt::print(stderr, "usage: {} [--first SEED] [--count N] [--say]\n", argv[0]);
      return 2;
    }
  }
  torch::set_num_threads(1);
  for (const int signal : {SIGSEGV, SIGABRT, SIGFPE, SIGBUS, SIGILL}) {
    std::signal(signal, died);
  }
  differential::Tally tally;
  std::vector<std::int64_t> seeds(static_cast<std::size_t>(std::max<std::int64_t>(count, 0)));
  std::iota(seeds.begin(), seeds.end(), first);
  if (argc == 1) {
    seeds.insert(seeds.end(), std::begin(once_wrong), std::end(once_wrong));
  }
  for (const std::int64_t seed : seeds) {
    current = static_cast<std::sig_atomic_t>(seed);
    differential::compare(static_cast<std::uint64_t>(seed), say, tally);
    if (tally.networks % 1000 == 0) {
      fmt::print("{} networks, {} failures\n", tally.networks, tally.failures.size());
      std::fflush(stdout);
    }
  }
  print("skipped", tally.skipped);
  print("refused", tally.refused);
  for (const auto& [way, error] : tally.largest) {
    fmt::print("largest error of {}: {:.2g}\n", way, error);
  }
  fmt::print("{} networks from seed {} on, {} gradients compared, {} failures\n", tally.networks, first,
             tally.gradients, tally.failures.size());
  return tally.failures.empty() ? 0 : 1;
}
