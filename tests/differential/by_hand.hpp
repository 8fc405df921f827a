/// @file
/// The gradient of a plan by plain double backward, written with LibTorch's operations alone.
#pragma once

#include "plan.hpp"

namespace differential {

/// State of a network in a type: parameters as leaves, buffers as copies.
[[nodiscard]] State state_in(const Plan& plan, torch::Dtype type);

/// The parameters that are trained, flat in float64; zeros where there is no gradient.
[[nodiscard]] Tensor flat(const Plan& plan, const State& state, const std::function<Tensor(std::size_t)>& gradient);

struct Outcome {
  Tensor loss_gradient, penalty_gradient;  // flat, float64; the penalties at strength 1
  double loss = 0;
  std::vector<double> penalties;
  Tensors buffers;
  Tensor generator;  // its state afterwards
};

/// `type` is what the network is computed in. Random numbers are drawn as the plan's type draws them.
[[nodiscard]] Outcome by_hand(const Plan& plan, torch::Dtype type);

}  // namespace differential
