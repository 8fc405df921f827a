// expect: microreg: the first callable of a Distribution must take (output, generator)
#include "step.hpp"

void step(torch::nn::Linear& model) {
  microreg::FisherTrace penalty{microreg::Distribution{
      [](const torch::Tensor& output) { return output.argmax(1); },
      [](const torch::Tensor& output, const torch::Tensor& labels) { return at::cross_entropy_loss(output, labels); }}};
  step_with(model, penalty, mse, torch::ones({2, 3}));
}
