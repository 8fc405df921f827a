// expect: microreg: this AnyPenalty is for other types than the model's
#include "step.hpp"

void step(torch::nn::Linear& model) {
  const microreg::AnyPenalty<torch::Tensor, std::tuple<torch::Tensor>> penalty;
  step_with(model, penalty, mse, torch::ones({2, 3}));
}
