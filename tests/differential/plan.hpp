/// @file
/// What is done with a random network: batch, loss, penalty and options.
#pragma once

#include "network.hpp"

#include <microreg/microreg.hpp>

#include <optional>
#include <string>
#include <vector>

namespace differential {

enum class LossName { cross_entropy, smoothed, weighted_classes, counted, mse, smooth_l1, l1, bce, nll };
enum class PenaltyName {
  gradient_norm,
  unsquared,
  average_jacobian,
  unit_jacobian,
  jacobian_norm,
  fisher_trace,
  input_jacobian,
  custom
};

struct PenaltyTerm {
  PenaltyName name = PenaltyName::gradient_norm;
  double factor = 1;
};

/// One case, all of it a function of the seed.
struct Plan {
  Network network;
  torch::Dtype type = torch::kFloat64;
  Tensor input, target;
  bool channels_last_weights = false;
  std::vector<bool> frozen, selected, outside;  // of the parameters: no gradient, count in penalties, also_train
  bool select = false;
  LossName loss = LossName::cross_entropy;
  std::vector<PenaltyTerm> penalties;
  double ratio = 1;  // of the penalties' gradient to the loss's, which decides the strength
  microreg::RegularizerOptions options;
  std::string description;

  /// The loss over a micro-batch as `options.reduction` has it; of `counted`, with the count.
  [[nodiscard]] microreg::CountedLoss evaluate_loss(const Tensor& output, const Tensor& y) const;
};

[[nodiscard]] Plan make_plan(std::uint64_t seed);

/// The scalar of the penalty made by SquaredGradientNorm.
[[nodiscard]] inline Tensor custom_probe(const Tensor& output) { return output.logsumexp(1).square().mean(); }

}  // namespace differential
