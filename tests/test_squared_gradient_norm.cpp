// The functor form: its graph, its type, its derivatives of higher order, and its errors.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>

using namespace helpers;

namespace {

/// The composition that the functor stands for.
torch::Tensor composed(const torch::Tensor& probe, const std::vector<torch::Tensor>& parameters) {
  torch::Tensor sum = torch::zeros({}, probe.options().requires_grad(false));
  for (const torch::Tensor& g : torch::autograd::grad({probe}, parameters, {}, true, true)) {
    sum = sum + g.square().sum();
  }
  return sum;
}

torch::Tensor gradient(const torch::Tensor& scalar, const std::vector<torch::Tensor>& parameters, bool create_graph) {
  std::vector<torch::Tensor> parts;
  for (const torch::Tensor& g : torch::autograd::grad({scalar}, parameters, {}, true, create_graph)) {
    parts.push_back(g.flatten());
  }
  return torch::cat(parts);
}

}  // namespace

TEST_CASE("value, gradient and third derivative are those of the composition", "[squared_gradient_norm]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(6);
  const auto parameters = model->parameters();
  const torch::Tensor loss = torch::cross_entropy_loss(model->forward(batch.input), batch.target);
  const torch::Tensor functor = microreg::squared_gradient_norm(loss, parameters);
  const torch::Tensor plain = composed(loss, parameters);
  CHECK(functor.dim() == 0);
  CHECK(functor.requires_grad());
  CHECK(functor.scalar_type() == torch::kFloat64);
  CHECK(relative_error(functor, plain) < 1e-14);
  // Of any function of it, so that the upstream gradient is not 1.
  CHECK(relative_error(gradient(functor.sqrt(), parameters, false), gradient(plain.sqrt(), parameters, false)) < 1e-12);
  const auto third = [&](const torch::Tensor& value) {
    return gradient(gradient(value.sqrt(), parameters, true).square().sum(), parameters, false);
  };
  CHECK(relative_error(third(functor), third(plain)) < 1e-11);
}

TEST_CASE("the graph of the probe is kept for the loss", "[squared_gradient_norm]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(6);
  const torch::Tensor loss = torch::cross_entropy_loss(model->forward(batch.input), batch.target);
  (void)microreg::GradientNorm{}(loss, model->parameters());
  (void)microreg::GradientNorm{}(loss, model->parameters());
  loss.backward();
  CHECK(flat_grad(model->parameters()).norm().item<double>() > 0);
}

TEST_CASE("a third derivative through BatchNorm in training mode is refused", "[squared_gradient_norm]") {
  auto model = networks::seeded_cnn(networks::Norm::batch, networks::Activation::smooth);
  const auto batch = networks::images(6);
  const auto penalty = [&] {
    const torch::Tensor loss = torch::cross_entropy_loss(model->forward(batch.input), batch.target);
    return microreg::GradientNorm{}(loss, model->parameters());
  };
  const torch::Tensor value = penalty();
  CHECK(has(message_of<microreg::ModelError>([&] { (void)gradient(value, model->parameters(), true); }),
            {"normalisation", "create_graph", "third derivative"}));
  // Without create_graph it is a second derivative, which is right.
  const torch::Tensor second = gradient(penalty(), model->parameters(), false);
  const torch::Tensor loss = torch::cross_entropy_loss(model->forward(batch.input), batch.target);
  CHECK(relative_error(second, gradient(composed(loss, model->parameters()), model->parameters(), false)) < 1e-12);
}

TEST_CASE("a third derivative through LayerNorm is refused", "[squared_gradient_norm]") {
  const torch::Tensor w = torch::ones({5}, torch::kFloat64).requires_grad_(true);
  const torch::Tensor y = torch::layer_norm(w * torch::arange(1, 11, torch::kFloat64).view({2, 5}).sin(), {5});
  const torch::Tensor value = microreg::squared_gradient_norm(y.pow(3).sum(), {w});
  CHECK(has(message_of<microreg::ModelError>([&] { (void)gradient(value, {w}, true); }),
            {"layer normalisation", "create_graph", "third derivative"}));
}

TEST_CASE("half types give a float32 scalar", "[squared_gradient_norm]") {
  const torch::Tensor w = torch::full({100000}, 0.5, torch::kBFloat16).requires_grad_(true);
  const torch::Tensor value = microreg::squared_gradient_norm((w.square() / 2).sum(), {w});
  CHECK(value.scalar_type() == torch::kFloat32);
  CHECK(value.item<double>() == Approx(25000.0).epsilon(1e-5));
  value.backward();
  CHECK(w.grad().scalar_type() == torch::kBFloat16);
  CHECK(relative_error(w.grad(), 2 * w) < 1e-2);
}

TEST_CASE("parameters the probe does not reach count as zero", "[squared_gradient_norm]") {
  const torch::Tensor w = helpers::tensor({3.0, 4.0}).requires_grad_(true);
  const torch::Tensor unused = torch::ones({2}).requires_grad_(true);
  const torch::Tensor value = microreg::squared_gradient_norm((w.square() / 2).sum(), {unused, w, torch::ones({2})});
  CHECK(value.item<double>() == Approx(25.0));
}

TEST_CASE("the functors name what they cannot use", "[squared_gradient_norm]") {
  using microreg::ModelError;
  auto model = networks::seeded_mlp();
  const auto parameters = model->parameters();
  const torch::Tensor output = model->forward(networks::vectors(4).input);
  const auto message = [](const auto& call) { return message_of<ModelError>([&] { (void)call(); }); };
  CHECK(has(message([&] { return microreg::GradientNorm{}(output, parameters); }),
            {"gradient_norm", "[4, 5]", "scalar", ".mean()"}));
  CHECK(has(message([&] { return microreg::GradientNorm{}(output.detach().mean(), parameters); }),
            {"gradient_norm", "no graph", "detach"}));
  CHECK(has(message([&] { return microreg::GradientNorm{}(torch::Tensor(), parameters); }),
            {"gradient_norm", "undefined"}));
  CHECK(has(message([&] { return microreg::GradientNorm{}(output.mean(), {}); }),
            {"no parameter requires a gradient", "0 given"}));
  const torch::Tensor other = torch::ones({2}, torch::kFloat64).requires_grad_(true);
  CHECK(has(message([&] { return microreg::GradientNorm{}(output.mean(), {other}); }),
            {"gradient_norm", "does not depend", "1 parameters"}));
}
