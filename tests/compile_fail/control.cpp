// expect: compiles
#include "step.hpp"

void step(torch::nn::Linear& model) { step_with(model, microreg::GradientNorm{}, mse, torch::ones({2, 3})); }
