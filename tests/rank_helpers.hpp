/// @file
/// What tests of several ranks share: samples, how they are cut, a network, and the step that one process takes.
#pragma once

#include "helpers.hpp"
#include "networks.hpp"
#include "thread_ranks.hpp"

#include <microreg/microreg.hpp>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace rank_helpers {

using helpers::relative_error;
using thread_ranks::is;
using thread_ranks::run_ranks;
using thread_ranks::try_ranks;
using thread_ranks::words_of;
using Ranks = std::shared_ptr<microreg::Communicator>;

struct Samples {
  torch::Tensor x, y;
  [[nodiscard]] Samples narrow(std::int64_t begin, std::int64_t size) const {
    return {x.narrow(0, begin, size), y.narrow(0, begin, size)};
  }
};

/// Of a seed; a generator of its own, since the threads share the default one.
inline torch::Generator seeded(std::uint64_t seed) { return helpers::generator(seed); }

inline Samples samples_of(std::int64_t count) {
  auto generator = seeded(7);
  return {torch::randn({count, 6}, generator, torch::kFloat64),
          torch::randint(0, networks::classes, {count}, generator, torch::kInt64)};
}

inline std::mutex making;

/// The same weights for the same seed, on whatever thread.
inline networks::Mlp mlp(std::uint64_t seed = 1) {
  const std::lock_guard lock(making);
  torch::manual_seed(seed);
  networks::Mlp model;
  model->to(torch::kFloat64);
  return model;
}

inline torch::Tensor cross_entropy(const torch::Tensor& output, const torch::Tensor& target) {
  return torch::nn::functional::cross_entropy(output, target);
}

/// What each rank has of all samples, in order.
struct Cut {
  std::vector<std::int64_t> sizes;
  [[nodiscard]] std::int64_t begin(std::int64_t rank) const {
    std::int64_t sum = 0;
    for (std::int64_t r = 0; r < rank; ++r) {
      sum += sizes[static_cast<std::size_t>(r)];
    }
    return sum;
  }
  [[nodiscard]] std::int64_t count() const { return static_cast<std::int64_t>(sizes.size()); }
  [[nodiscard]] Samples of(const Samples& all, const Ranks& ranks) const {
    return all.narrow(begin(ranks->rank()), sizes[static_cast<std::size_t>(ranks->rank())]);
  }
};

/// Textbook double backward of sum weight(M) * (L_M + strength * ||grad L_M||^2).
inline torch::Tensor textbook(const Cut& cut, const Samples& all, std::int64_t micro_batch_size, double strength,
                              bool reference_weights) {
  auto model = mlp();
  std::vector<Samples> micro_batches;
  for (std::int64_t r = 0; r < cut.count(); ++r) {
    const std::int64_t size = cut.sizes[static_cast<std::size_t>(r)];
    for (std::int64_t i = 0; i < size; i += micro_batch_size) {
      micro_batches.push_back(all.narrow(cut.begin(r) + i, std::min(micro_batch_size, size - i)));
    }
  }
  torch::Tensor objective = torch::zeros({}, torch::kFloat64);
  for (const Samples& m : micro_batches) {
    const double weight = reference_weights ? 1.0 / static_cast<double>(micro_batches.size())
                                            : static_cast<double>(m.x.size(0)) / static_cast<double>(all.x.size(0));
    const torch::Tensor loss = cross_entropy(model->forward(m.x), m.y);
    torch::Tensor squares = torch::zeros({}, torch::kFloat64);
    for (const torch::Tensor& g : torch::autograd::grad({loss}, model->parameters(), {}, true, true)) {
      squares = squares + g.square().sum();
    }
    objective = objective + weight * (loss + strength * squares);
  }
  objective.backward();
  return helpers::flat_grad(model->parameters());
}

}  // namespace rank_helpers
