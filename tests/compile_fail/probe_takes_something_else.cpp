// expect: microreg: this penalty cannot be evaluated on this model
#include "step.hpp"

void step(torch::nn::Linear& model) {
  microreg::SquaredGradientNorm penalty{[](const std::string& /*text*/) { return torch::zeros({}); }};
  step_with(model, penalty, mse, torch::ones({2, 3}));
}
