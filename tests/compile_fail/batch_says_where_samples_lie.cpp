// expect: microreg: the batch says where its samples lie
#include "step.hpp"

void step(torch::nn::Linear& model) {
  step_with(model, microreg::GradientNorm{}, mse, microreg::Along<1>(torch::ones({2, 3})));
}
