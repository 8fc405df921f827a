// Before a training begins: what one micro-batch tells about model, loss and penalty.
#include <torch/torch.h>

#include <iostream>
#include <microreg/microreg.hpp>
#include <microreg/verify.hpp>

int main() {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Conv2d(torch::nn::Conv2dOptions(3, 16, 3).padding(1).bias(false)),
                              torch::nn::BatchNorm2d(16), torch::nn::ReLU(), torch::nn::MaxPool2d(2),
                              torch::nn::Conv2d(torch::nn::Conv2dOptions(16, 32, 3).padding(1)), torch::nn::ReLU(),
                              torch::nn::AdaptiveAvgPool2d(1), torch::nn::Flatten(), torch::nn::Dropout(0.1),
                              torch::nn::Linear(32, 10));
  const auto images = torch::randn({200, 3, 32, 32});
  const auto labels = torch::randint(10, {200});

  // [verify]
  auto found = microreg::verify(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{}, images, labels,
                                {.strength = 0.01, .micro_batch_size = 64});
  std::cout << found << '\n';
  // [end]

  return found.ok() ? 0 : 1;
}
