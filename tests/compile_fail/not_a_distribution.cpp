// expect: microreg: FisherTrace needs a distribution
#include "step.hpp"

struct OnlySamples {
  [[nodiscard]] torch::Tensor sample(const torch::Tensor& output) const { return output; }
};

void step(torch::nn::Linear& model) {
  step_with(model, microreg::FisherTrace{OnlySamples{}}, mse, torch::ones({2, 3}));
}
