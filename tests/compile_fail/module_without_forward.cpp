// expect: microreg: a torch::nn::Module has no forward()
#include "step.hpp"

void step(const std::shared_ptr<torch::nn::Module>& model) {
  step_with(model, microreg::GradientNorm{}, mse, torch::ones({2, 3}));
}
