// expect: microreg: a module passed by reference must be a non-const object that outlives the Regularizer
#include "step.hpp"

void step() { step_with(torch::nn::LinearImpl(3, 2), microreg::GradientNorm{}, mse, torch::ones({2, 3})); }
