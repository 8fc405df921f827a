#include "library.hpp"

#include <torch/nn/modules/linear.h>
#include <microreg/microreg.hpp>

double gradient_norm_in_library() {
  torch::manual_seed(1);
  torch::nn::Linear model(3, 2);
  const auto squared_error = [](const torch::Tensor& output, const torch::Tensor& target) {
    return at::mse_loss(output, target);
  };
  microreg::Regularizer regularizer(model, squared_error, microreg::GradientNorm{},
                                    {.strength = 0.1, .micro_batch_size = 2});
  return regularizer.backward(torch::randn({4, 3}), torch::randn({4, 2})).gradient_norm.item<double>();
}
