/// @file
/// The small networks that the tests train, with 5 classes each.
#pragma once

#include <torch/torch.h>

#include <string>
#include <utility>

namespace networks {

constexpr std::int64_t classes = 5;

/// Inputs [M, 6], one hidden layer of 7 tanh units.
struct MlpImpl : torch::nn::Module {
  MlpImpl() {
    register_module("hidden", hidden);
    register_module("output", output);
  }
  torch::Tensor forward(const torch::Tensor& x) { return output(torch::tanh(hidden(x))); }

  torch::nn::Linear hidden{6, 7};
  torch::nn::Linear output{7, classes};
};
TORCH_MODULE(Mlp);

enum class Norm { none, batch };
/// `smooth` is softplus with average pooling, `kinked` is ReLU with max pooling.
enum class Activation { kinked, smooth };

/// Inputs [M, 2, 6, 6], two convolutions.
struct CnnImpl : torch::nn::Module {
  explicit CnnImpl(Norm norm_kind = Norm::none, Activation activation_kind = Activation::kinked)
      : norm(norm_kind), activation(activation_kind) {
    register_module("conv1", conv1);
    register_module("conv2", conv2);
    if (norm == Norm::batch) {
      register_module("norm1", norm1);
      register_module("norm2", norm2);
    }
    register_module("output", output);
  }

  torch::Tensor forward(const torch::Tensor& x) {
    torch::Tensor h = conv1(x);
    h = activate(norm == Norm::batch ? norm1(h) : h);
    h = activation == Activation::smooth ? torch::avg_pool2d(h, 2) : torch::max_pool2d(h, 2);
    h = conv2(h);
    h = activate(norm == Norm::batch ? norm2(h) : h);
    return output(h.mean({2, 3}));
  }

  [[nodiscard]] torch::Tensor activate(const torch::Tensor& h) const {
    return activation == Activation::smooth ? torch::softplus(h) : torch::relu(h);
  }

  Norm norm;
  Activation activation;
  torch::nn::Conv2d conv1{torch::nn::Conv2dOptions(2, 3, 3).padding(1)};
  torch::nn::Conv2d conv2{torch::nn::Conv2dOptions(3, 4, 3).padding(1)};
  torch::nn::BatchNorm2d norm1{3};
  torch::nn::BatchNorm2d norm2{4};
  torch::nn::Linear output{4, classes};
};
TORCH_MODULE(Cnn);

/// A mini-batch of random samples, float64.
struct Samples {
  torch::Tensor input, target;
};
inline Samples vectors(std::int64_t count) {
  return {torch::randn({count, 6}, torch::kFloat64), torch::randint(classes, {count})};
}
inline Samples images(std::int64_t count) {
  return {torch::randn({count, 2, 6, 6}, torch::kFloat64), torch::randint(classes, {count})};
}
/// An MLP in float64 with fixed weights.
inline Mlp seeded_mlp(std::uint64_t seed = 1) {
  torch::manual_seed(seed);
  Mlp model;
  model->to(torch::kFloat64);
  return model;
}
inline Cnn seeded_cnn(Norm norm, Activation activation, std::uint64_t seed = 1) {
  torch::manual_seed(seed);
  Cnn model(norm, activation);
  model->to(torch::kFloat64);
  return model;
}

}  // namespace networks
