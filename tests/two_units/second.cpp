/// @file
/// The other of two translation units that include every header.
#include "first.hpp"

#include <torch/nn/modules/linear.h>
#include <microreg/format.hpp>
#include <microreg/microreg.hpp>

int main() {
  torch::manual_seed(1);
  const double first = gradient_norm_in_first_unit();
  torch::manual_seed(1);
  torch::nn::Linear model(2, 1);
  const auto second =
      microreg::GradientNorm{}(model->forward(torch::ones({3, 2})).mean().square(), model->parameters());
  return first == second.item<double>() ? 0 : 1;
}
