/// @file
/// One of two translation units that include every header: a function that is not inline would be defined twice.
#include "first.hpp"

#include <torch/nn/modules/linear.h>
#include <microreg/format.hpp>
#include <microreg/microreg.hpp>

double gradient_norm_in_first_unit() {
  torch::nn::Linear model(2, 1);
  return microreg::GradientNorm{}(model->forward(torch::ones({3, 2})).mean().square(), model->parameters())
      .item<double>();
}
