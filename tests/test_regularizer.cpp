// The step counter, schedules, modes, and precisions of Regularizer; strengths.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>

using namespace helpers;

TEST_CASE("linear warm-up", "[strength]") {
  const microreg::LinearWarmUp warm_up{.peak = 0.8, .steps = 4};
  CHECK(warm_up(0) == 0);
  CHECK(warm_up(1) == Approx(0.2));
  CHECK(warm_up(3) == Approx(0.6));
  CHECK(warm_up(4) == 0.8);
  CHECK(warm_up(1000) == 0.8);
  CHECK(microreg::LinearWarmUp{.peak = 0.8, .steps = 0}(0) == 0.8);
  CHECK(microreg::Strength(warm_up).at(2) == Approx(0.4));
  CHECK(microreg::Strength(0.3).at(7) == 0.3);
  CHECK(microreg::Strength(2).at(7) == 2.0);
}

TEST_CASE("a schedule is asked once a step, and a run can resume", "[regularizer]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(8);
  microreg::Regularizer regularizer(
      model, cross_entropy,
      microreg::LinearWarmUp{.peak = 1, .steps = 10} * microreg::GradientNorm{} + 0.5 * microreg::AverageJacobian{},
      {.strength = [](std::int64_t step) { return step < 2 ? 1.0 : 3.0; }});
  const auto strengths = [&] {
    const auto report = regularizer.backward(batch.input, batch.target);
    return std::tuple{report.step, report.penalties[0].strength, report.penalties[1].strength};
  };
  CHECK(strengths() == std::tuple{0, 0.0, 0.5});
  CHECK(strengths() == std::tuple{1, 0.1, 0.5});
  CHECK(regularizer.step() == 2);
  CHECK(strengths() == std::tuple{2, 3 * 0.2, 1.5});
  regularizer.set_step(20);
  CHECK(strengths() == std::tuple{20, 3.0, 1.5});
  CHECK(regularizer.step() == 21);
}

TEST_CASE("BatchNorm statistics move as in one plain forward pass over the micro-batches", "[regularizer]") {
  auto model = networks::seeded_cnn(networks::Norm::batch, networks::Activation::kinked);
  auto twin = networks::seeded_cnn(networks::Norm::batch, networks::Activation::kinked);
  const auto batch = networks::images(10);
  microreg::Regularizer regularizer(model, cross_entropy, microreg::GradientNorm{} + microreg::FisherTrace{},
                                    {.micro_batch_size = 4});
  (void)regularizer.backward(batch.input, batch.target);
  for (const torch::Tensor& part : batch.input.split(4)) {
    twin->forward(part);
  }
  for (std::size_t i = 0; i < twin->buffers().size(); ++i) {
    CHECK(same_bits(model->buffers()[i], twin->buffers()[i]));
  }
  CHECK(model->norm1->num_batches_tracked.item<std::int64_t>() == 3);
}

TEST_CASE("the loss and the penalty see the same dropout masks", "[regularizer]") {
  // With one pass, GN of a network with dropout is the gradient of the very loss that is reported.
  torch::manual_seed(101);
  torch::nn::Sequential model(torch::nn::Linear(6, 32), torch::nn::Dropout(0.5), torch::nn::Tanh(),
                              torch::nn::Linear(32, networks::classes));
  model->to(torch::kFloat64);
  const auto batch = networks::vectors(8);
  torch::manual_seed(102);
  microreg::Regularizer regularizer(model, cross_entropy, microreg::GradientNorm{}, {.strength = 0.0});
  const auto report = regularizer.backward(batch.input, batch.target);
  const double norm = flat_grad(model->parameters()).norm().item<double>();
  CHECK(report.penalties[0].micro_batch_norms[0].item<double>() == Approx(norm).epsilon(1e-12));
}

TEST_CASE("a step works inside NoGradGuard and leaves the mode alone", "[regularizer]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(8);
  microreg::Regularizer regularizer(model, cross_entropy, microreg::GradientNorm{}, {.micro_batch_size = 4});
  (void)regularizer.backward(batch.input, batch.target);
  const torch::Tensor expected = flat_grad(model->parameters());
  clear_grad(model->parameters());
  {
    const torch::NoGradGuard no_grad;
    (void)regularizer.backward(batch.input, batch.target);
    CHECK_FALSE(torch::GradMode::is_enabled());
  }
  CHECK(same_bits(flat_grad(model->parameters()), expected));
}

TEST_CASE("half types: norms add up in float32, gradients keep the parameters' type", "[regularizer]") {
  // In bfloat16 a sum of squares of equal terms stops growing after a few hundred; float32 goes on.
  const torch::Tensor w = torch::full({100000}, 0.5, torch::kBFloat16).requires_grad_(true);
  const microreg::FunctionModel model{
      [&](const torch::Tensor& x) { return (w.square() / 2).sum().expand({x.size(0)}); }, {w}};
  const auto mean = [](const torch::Tensor& output, const torch::Tensor&) { return output.mean(); };
  microreg::Regularizer regularizer(model, mean, microreg::GradientNorm{}, {.micro_batch_size = 2});
  const torch::Tensor x = torch::ones({2}, torch::kBFloat16);
  const auto report = regularizer.backward(x, x);
  // grad = w, so R = 100000 / 4 and its gradient is 2 w.
  CHECK(report.penalties[0].value.scalar_type() == torch::kFloat32);
  CHECK(report.penalties[0].value.item<double>() == Approx(25000.0).epsilon(1e-5));
  CHECK(w.grad().scalar_type() == torch::kBFloat16);
  CHECK(relative_error(w.grad(), 3 * w) < 1e-2);

  torch::manual_seed(103);
  torch::nn::Linear layer(8, 4);
  layer->to(torch::kBFloat16);
  const torch::Tensor input = torch::randn({8, 8});
  const torch::Tensor labels = torch::randint(4, {8});
  torch::nn::Linear exact(8, 4);
  {
    const torch::NoGradGuard no_grad;
    exact->weight.copy_(layer->weight);
    exact->bias.copy_(layer->bias);
  }
  const auto run = [&](torch::nn::Linear& any, torch::ScalarType type) {
    microreg::Regularizer step(any, cross_entropy, microreg::GradientNorm{} + microreg::AverageJacobian{},
                               {.micro_batch_size = 4});
    return step.backward(input.to(type), labels).penalties[0].value;
  };
  CHECK(relative_error(run(layer, torch::kBFloat16), run(exact, torch::kFloat32)) < 0.05);
  CHECK(relative_error(flat_grad(layer->parameters()), flat_grad(exact->parameters())) < 0.05);
}
