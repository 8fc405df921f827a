// expect: microreg: this is not a penalty
#include "step.hpp"

void step(torch::nn::Linear& model) { step_with(model, 0.01, mse, torch::ones({2, 3})); }
