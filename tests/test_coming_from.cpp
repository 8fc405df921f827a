// The translations of docs/coming-from.md: what the page calls the same is computed here both ways. check_docs.cmake
// looks for the page's code in this file.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>

#include <tuple>
#include <vector>

using namespace helpers;
using networks::Samples;

namespace {

using Tensors = std::vector<torch::Tensor>;

torch::Tensor criterion(const torch::Tensor& output, const torch::Tensor& labels) {
  return torch::cross_entropy_loss(output, labels);
}

/// The gradient of the mean loss of some samples.
Tensors plain_gradient(networks::Mlp& model, const torch::Tensor& x, const torch::Tensor& y) {
  return torch::autograd::grad({criterion(model->forward(x), y)}, model->parameters());
}

/// w += factor * direction.
void move(const Tensors& parameters, const Tensors& direction, double factor) {
  const torch::NoGradGuard no_grad;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    parameters[i].add_(direction[i], factor);
  }
}

/// The gradient at w + radius * g / ||g||, as sharpness-aware minimisation takes it.
Tensors gradient_uphill(networks::Mlp& model, const torch::Tensor& x, const torch::Tensor& y, double radius) {
  const Tensors g = plain_gradient(model, x, y);
  const double factor = radius / flat(g).norm().item<double>();
  move(model->parameters(), g, factor);
  Tensors result = plain_gradient(model, x, y);
  move(model->parameters(), g, -factor);
  return result;
}

Tensors grads_of(const networks::Mlp& model) {
  Tensors result;
  for (const torch::Tensor& parameter : model->parameters()) {
    result.push_back(parameter.grad().clone());
  }
  return result;
}

}  // namespace

TEST_CASE("coming from the authors' code: lambda is the strength", "[coming_from]") {
  auto model = networks::seeded_mlp();
  const auto [images, labels] = networks::vectors(20);
  const double lambda = 0.3;

  // As there, in micro-batches of 8, 8 and 4 samples.
  const double iter_count = 3;
  clear_grad(model->parameters());
  for (std::int64_t i = 0; i < 20; i += 8) {
    const auto loss = criterion(model->forward(images.slice(0, i, i + 8)), labels.slice(0, i, i + 8));
    auto reg_term = torch::zeros({}, torch::kFloat64);
    for (const auto& g : torch::autograd::grad({loss}, model->parameters(), {}, true, true)) {
      reg_term = reg_term + g.pow(2).sum();
    }
    ((loss + lambda * reg_term) / iter_count).backward();
  }
  const auto theirs = flat_grad(model->parameters());

  clear_grad(model->parameters());
  microreg::Regularizer regularizer(
      model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{},
      {.strength = lambda, .micro_batch_size = 8, .weighting = microreg::Weighting::reference});
  regularizer.backward(images, labels);
  CHECK(relative_error(flat_grad(model->parameters()), theirs) < 1e-12);
}

TEST_CASE("coming from sharpness-aware minimisation: rho is the strength and the step", "[coming_from]") {
  auto model = networks::seeded_mlp();
  const auto [images, labels] = networks::vectors(16);
  const double rho = 0.05;

  // m-SAM with m = 8: each half uphill on its own.
  const auto sam = (flat(gradient_uphill(model, images.slice(0, 0, 8), labels.slice(0, 0, 8), rho)) +
                    flat(gradient_uphill(model, images.slice(0, 8), labels.slice(0, 8), rho))) /
                   2;

  clear_grad(model->parameters());
  microreg::Regularizer regularizer(
      model, torch::nn::CrossEntropyLoss(), microreg::Unsquared{microreg::GradientNorm{}},
      {.strength = rho,
       .micro_batch_size = 8,
       .estimator = microreg::ForwardDifference{.step = rho, .gates = microreg::Gates::free}});
  regularizer.backward(images, labels);
  CHECK(relative_error(flat_grad(model->parameters()), sam) < 1e-12);

  // What it is of first order in rho: the gradient of L + rho ||grad L||, which Exact computes.
  const auto [x, y] = Samples{images, labels};
  const auto penalty_by_sam = [&](double radius) {
    return (flat(gradient_uphill(model, x, y, radius)) - flat(plain_gradient(model, x, y))) / radius;
  };
  clear_grad(model->parameters());
  auto penalty = microreg::Unsquared{microreg::GradientNorm{}}(criterion(model->forward(x), y), model->parameters());
  penalty.backward();
  const auto exact = flat_grad(model->parameters());
  CHECK(relative_error(penalty_by_sam(1e-4), exact) < 1e-3);
  CHECK(relative_error(penalty_by_sam(1e-5), exact) < 1e-4);
}

TEST_CASE("coming from gradient-norm penalties: alpha r is the strength", "[coming_from]") {
  auto model = networks::seeded_mlp();
  const auto [images, labels] = networks::vectors(16);
  const double r = 0.1;
  const double alpha = 0.7;
  const auto theirs = (1 - alpha) * flat(plain_gradient(model, images, labels)) +
                      alpha * flat(gradient_uphill(model, images, labels, r));

  clear_grad(model->parameters());
  microreg::Regularizer regularizer(
      model, torch::nn::CrossEntropyLoss(), microreg::Unsquared{microreg::GradientNorm{}},
      {.strength = alpha * r,
       .micro_batch_size = 16,
       .estimator = microreg::ForwardDifference{.step = r, .gates = microreg::Gates::free}});
  regularizer.backward(images, labels);
  CHECK(relative_error(flat_grad(model->parameters()), theirs) < 1e-12);
}

TEST_CASE("coming from implicit gradient regularization: a quarter of the learning rate", "[coming_from]") {
  const auto [images, labels] = networks::vectors(16);
  // How far a step of gradient descent is from the flow along the penalised gradient for as long a time.
  const auto distance = [&x = images, &y = labels](double learning_rate, double strength) {
    auto model = networks::seeded_mlp();
    const Tensors parameters = model->parameters();
    const Tensors start = clones(parameters);
    const auto put_back = [&] {
      const torch::NoGradGuard no_grad;
      for (std::size_t i = 0; i < start.size(); ++i) {
        parameters[i].copy_(start[i]);
      }
    };
    move(parameters, plain_gradient(model, x, y), -learning_rate);
    const auto by_descent = flat(clones(parameters));
    put_back();

    microreg::Regularizer regularizer(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{},
                                      {.strength = strength, .micro_batch_size = 16});
    const int steps = 8;
    const double h = learning_rate / steps;
    const auto slope_after = [&](const Tensors& direction, double time) {
      move(parameters, direction, -time);
      clear_grad(parameters);
      regularizer.backward(x, y);
      move(parameters, direction, time);
      return grads_of(model);
    };
    for (int i = 0; i < steps; ++i) {  // Runge-Kutta, fourth order
      const Tensors k1 = slope_after(parameters, 0);
      const Tensors k2 = slope_after(k1, h / 2);
      const Tensors k3 = slope_after(k2, h / 2);
      const Tensors k4 = slope_after(k3, h);
      move(parameters, k1, -h / 6);
      move(parameters, k2, -h / 3);
      move(parameters, k3, -h / 3);
      move(parameters, k4, -h / 6);
    }
    return (flat(clones(parameters)) - by_descent).norm().item<double>();
  };
  // Second order without the penalty, third order with it: halving the rate leaves a fourth, or an eighth.
  const double rate = 0.1;
  CHECK(distance(rate, 0) / distance(rate / 2, 0) == Approx(4).epsilon(0.1));
  CHECK(distance(rate, rate / 4) / distance(rate / 2, rate / 8) == Approx(8).epsilon(0.1));
}

TEST_CASE("coming from explicit gradient regularization: mu is the strength", "[coming_from]") {
  auto model = networks::seeded_mlp();
  const auto [images, labels] = networks::vectors(12);
  const double mu = 0.3;
  const torch::Tensor loss = criterion(model->forward(images), labels);
  (loss + mu * squared_norm_by_hand(loss, model->parameters())).backward();
  const auto theirs = flat_grad(model->parameters());

  clear_grad(model->parameters());
  microreg::Regularizer regularizer(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{},
                                    {.strength = mu, .micro_batch_size = 12});
  regularizer.backward(images, labels);
  CHECK(relative_error(flat_grad(model->parameters()), theirs) < 1e-12);
}

TEST_CASE("coming from input Jacobians: half of lambda", "[coming_from]") {
  auto model = networks::seeded_mlp();
  const auto [images, labels] = networks::vectors(6);
  const double lambda = 0.4;

  // L + lambda / 2 * mean over x of ||df/dx||_F^2
  const auto input = images.clone().requires_grad_(true);
  const auto output = model->forward(input);
  auto jacobian = torch::zeros({}, torch::kFloat64);
  for (std::int64_t c = 0; c < output.size(1); ++c) {
    jacobian = jacobian + torch::autograd::grad({output.select(1, c).sum()}, {input}, {}, true, true)[0].square().sum();
  }
  clear_grad(model->parameters());
  (criterion(output, labels) + lambda / 2 * jacobian / images.size(0)).backward();
  const auto theirs = flat_grad(model->parameters());

  clear_grad(model->parameters());
  microreg::InputJacobian penalty{.expectation = microreg::Expectation::exact};
  microreg::Regularizer regularizer(model, torch::nn::CrossEntropyLoss(), penalty, {.strength = lambda / 2});
  regularizer.backward(images, labels);
  CHECK(relative_error(flat_grad(model->parameters()), theirs) < 1e-12);
}

TEST_CASE("coming from double backpropagation: the losses are the output", "[coming_from]") {
  auto model = networks::seeded_mlp();
  const auto [images, labels] = networks::vectors(6);
  const double lambda = 0.4;

  // L + lambda * mean over x of ||dl(x)/dx||^2, l(x) the loss of one sample
  const auto input = images.clone().requires_grad_(true);
  const auto l = torch::cross_entropy_loss(model->forward(input), labels, {}, at::Reduction::None);
  const auto g = torch::autograd::grad({l.sum()}, {input}, {}, true, true)[0];
  clear_grad(model->parameters());
  (l.mean() + lambda * g.square().sum() / images.size(0)).backward();
  const auto theirs = flat_grad(model->parameters());

  clear_grad(model->parameters());
  microreg::FunctionModel losses{[&](const torch::Tensor& x, const torch::Tensor& y) {
                                   return torch::cross_entropy_loss(model->forward(x), y, {}, at::Reduction::None);
                                 },
                                 model->parameters()};
  auto mean = [](const torch::Tensor& output) { return output.mean(); };
  microreg::Regularizer<std::tuple<torch::Tensor, torch::Tensor>, microreg::NoTarget> regularizer(
      losses, mean, microreg::InputJacobian{.expectation = microreg::Expectation::exact}, {.strength = lambda});
  regularizer.backward({images, labels});
  CHECK(relative_error(flat_grad(model->parameters()), theirs) < 1e-12);
}
