// expect: microreg: this penalty cannot be evaluated on this model: it must offer probe(pass)
#include "step.hpp"

struct Probeless {
  static const char* name() { return "probeless"; }
};

void step(torch::nn::Linear& model) { step_with(model, Probeless{}, mse, torch::ones({2, 3})); }
