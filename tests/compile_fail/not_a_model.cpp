// expect: microreg: this is not a model
#include "step.hpp"

void step() {
  step_with([](const torch::Tensor& x) { return x; }, microreg::GradientNorm{}, mse, torch::ones({2, 3}));
}
