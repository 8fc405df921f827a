// expect: microreg: the model cannot be called with this input
#include "step.hpp"

void step(torch::nn::Linear& model) {
  step_with(model, microreg::GradientNorm{}, mse, std::vector<torch::Tensor>{torch::ones({2, 3})});
}
