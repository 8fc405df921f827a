/// @file
/// One regularized step, as a project that finds microreg would take it.
#include <torch/nn/modules/linear.h>
#include <microreg/microreg.hpp>

#if defined(CONSUMER_LIBRARY)
#include "library.hpp"
#endif

#include <iostream>

int main() {
  torch::manual_seed(1);
  torch::nn::Linear model(3, 2);
  const auto squared_error = [](const torch::Tensor& output, const torch::Tensor& target) {
    return at::mse_loss(output, target);
  };
  microreg::Regularizer regularizer(model, squared_error, microreg::GradientNorm{},
                                    {.strength = 0.1, .micro_batch_size = 2});
  const microreg::Report report = regularizer.backward(torch::randn({4, 3}), torch::randn({4, 2}));
  const auto gradient_norm = report.gradient_norm.item<double>();
  std::cout << "microreg " << microreg::version << ": |grad| " << gradient_norm << "\n";
#if defined(CONSUMER_LIBRARY)
  if (gradient_norm_in_library() != gradient_norm) {
    std::cout << "the same step in the shared library gives another result\n";
    return 1;
  }
#endif
  return gradient_norm > 0 && model->weight.grad().defined() ? 0 : 1;
}
