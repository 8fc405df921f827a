// expect: microreg: the probe must return a scalar torch::Tensor
#include "step.hpp"

void step(torch::nn::Linear& model) {
  microreg::SquaredGradientNorm penalty{[](const torch::Tensor& output) { return output.mean().item<double>(); }};
  step_with(model, penalty, mse, torch::ones({2, 3}));
}
