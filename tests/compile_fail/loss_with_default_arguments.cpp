// expect: microreg: the loss cannot be called as loss(output, target)
#include "step.hpp"

void step(torch::nn::Linear& model) {
  step_with(model, microreg::GradientNorm{}, torch::mse_loss, torch::ones({2, 3}));
}
