/// @file
/// Which micro-batches of a step are penalised, and how much they count then.
#pragma once

#include <microreg/detail/config.hpp>
#include <microreg/options.hpp>

#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// The penalised micro-batches of one step; `factor` is what their weights are multiplied by.
struct Choice {
  std::vector<bool> chosen;
  double factor = 1;
};

inline Choice all_penalised(std::int64_t count) { return {std::vector<bool>(static_cast<std::size_t>(count), true)}; }

/// Chooses as `sampling` says.
///
/// Of K micro-batches a uniformly random subset of n is penalised, where n is q K rounded up or down at random with
/// expectation q K: less variance than a coin for each. The factor is K / n, or, where n may be 0, 1 / q: either way
/// the expectation of the weighted sum is the sum over all. The random numbers depend on the seed and the step only, so
/// a run that resumes, and a step that is repeated after an error, choose the same.
inline Choice choose_penalised(const Sampling& sampling, std::int64_t step, std::int64_t count) {
  Choice result = all_penalised(count);
  const auto size = static_cast<std::size_t>(count);
  if (step % sampling.every != 0) {
    result.chosen.assign(size, false);
    return result;
  }
  result.factor = static_cast<double>(sampling.every);
  if (sampling.share >= 1) {
    return result;
  }
  const auto low = [](std::uint64_t value) { return static_cast<std::uint32_t>(value); };
  const auto high = [](std::uint64_t value) { return static_cast<std::uint32_t>(value >> 32); };
  const auto counter = static_cast<std::uint64_t>(step);
  std::seed_seq sequence{low(sampling.seed), high(sampling.seed), low(counter), high(counter)};
  std::mt19937_64 engine(sequence);
  // Not std::uniform_*_distribution, whose results differ between standard libraries.
  const auto uniform = [&engine] { return std::ldexp(static_cast<double>(engine() >> 11), -53); };

  const double expected = sampling.share * static_cast<double>(count);
  const double floor = std::floor(expected);
  const auto drawn = static_cast<std::size_t>(floor) + (uniform() < expected - floor ? 1 : 0);
  result.factor *= expected < 1 ? 1 / sampling.share : static_cast<double>(count) / static_cast<double>(drawn);

  std::vector<std::size_t> order(size);
  std::iota(order.begin(), order.end(), std::size_t{0});
  result.chosen.assign(size, false);
  for (std::size_t i = 0; i < drawn; ++i) {
    const auto offset = static_cast<std::size_t>(uniform() * static_cast<double>(size - i));
    std::swap(order[i], order[i + offset]);
    result.chosen[order[i]] = true;
  }
  return result;
}

}  // namespace microreg::inline MICROREG_ABI::detail
