// InputJacobian against closed forms and its definition, and Unsquared.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>

#include <cmath>
#include <functional>
#include <utility>

using namespace helpers;
using microreg::Expectation;
using microreg::InputJacobian;

namespace {

const auto no_loss = [](const torch::Tensor& output, const torch::Tensor&) { return (output * 0).sum(); };

/// mean over samples of ||df/dx||_F^2 as a graph, sample by sample and row by row.
template <class Model>
torch::Tensor by_definition(Model& model, const torch::Tensor& input) {
  torch::Tensor sum = torch::zeros({}, torch::kFloat64);
  for (std::int64_t i = 0; i < input.size(0); ++i) {
    const torch::Tensor x = input.narrow(0, i, 1).clone().requires_grad_(true);
    const torch::Tensor output = model->forward(x)[0];
    for (std::int64_t c = 0; c < output.size(0); ++c) {
      sum = sum + torch::autograd::grad({output[c]}, {x}, {}, true, true)[0].square().sum();
    }
  }
  return sum / input.size(0);
}

std::pair<double, double> monte_carlo(int repeats, const std::function<double()>& draw) {
  double mean = 0;
  double squares = 0;
  for (int i = 0; i < repeats; ++i) {
    const double value = draw();
    mean += value / repeats;
    squares += value * value / repeats;
  }
  return {mean, std::sqrt((squares - mean * mean) / repeats)};
}

}  // namespace

TEST_CASE("the input Jacobian of a linear model is its weight", "[input_jacobian]") {
  torch::manual_seed(4);
  torch::nn::Linear model(6, 3);
  model->to(torch::kFloat64);
  const torch::Tensor x = torch::randn({5, 6}, torch::kFloat64);
  microreg::Regularizer regularizer(model, no_loss, InputJacobian{.expectation = Expectation::exact},
                                    {.strength = 0.7, .micro_batch_size = 2});
  const auto report = regularizer.backward(x, x);
  const torch::Tensor expected = model->weight.detach().square().sum();
  CHECK(relative_error(report.penalties[0].value, expected) < 1e-12);
  CHECK(relative_error(report.penalties[0].micro_batch_norms.square(), expected.expand({3})) < 1e-12);
  CHECK(relative_error(model->weight.grad(), 0.7 * 2 * model->weight) < 1e-12);
  CHECK(model->bias.grad().abs().sum().item<double>() == 0);
  CHECK_FALSE(x.requires_grad());
}

TEST_CASE("the exact input Jacobian against its definition", "[input_jacobian]") {
  const auto check = [](auto model, const torch::Tensor& input) {
    const auto parameters = model->parameters();
    clear_grad(parameters);
    const torch::Tensor expected = by_definition(model, input);
    expected.backward();
    const torch::Tensor gradient = flat_grad(parameters);
    const InputJacobian penalty{.expectation = Expectation::exact};

    clear_grad(parameters);
    microreg::Regularizer regularizer(model, no_loss, penalty, {.micro_batch_size = 4});
    CHECK(relative_error(regularizer.backward(input, input).penalties[0].value, expected) < 1e-12);
    CHECK(relative_error(flat_grad(parameters), gradient) < 1e-12);

    clear_grad(parameters);
    const torch::Tensor x = input.clone().requires_grad_(true);
    const torch::Tensor value = penalty(model->forward(x), {x});
    CHECK(relative_error(value, expected) < 1e-12);
    for (const torch::Tensor& g : torch::autograd::grad({value}, parameters, {}, true, false, true)) {
      CHECK((!g.defined() || g.isfinite().all().item<bool>()));
    }
  };
  SECTION("MLP") { check(networks::seeded_mlp(), networks::vectors(10).input); }
  SECTION("CNN with BatchNorm in evaluation mode") {
    auto model = networks::seeded_cnn(networks::Norm::batch, networks::Activation::kinked);
    model->eval();
    check(model, networks::images(10).input);
  }
}

TEST_CASE("random projections average to the exact input Jacobian", "[input_jacobian]") {
  auto model = networks::seeded_mlp();
  const torch::Tensor input = networks::vectors(4).input;
  const double expected = by_definition(model, input).template item<double>();
  const std::int64_t projections = GENERATE(1, 4);
  const torch::Tensor x = input.clone().requires_grad_(true);
  at::Generator draws = generator(5);
  const auto [mean, error] = monte_carlo(1500, [&] {
    return InputJacobian{.projections = projections}(model->forward(x), {x}, draws).template item<double>();
  });
  CHECK(error < 0.03 * expected);
  CHECK(std::abs(mean - expected) < 4.5 * error);
}

TEST_CASE("the step draws the projections that the functor draws", "[input_jacobian]") {
  auto model = networks::seeded_mlp();
  const torch::Tensor input = networks::vectors(4).input;
  const InputJacobian penalty{.projections = 3};
  clear_grad(model->parameters());
  microreg::Regularizer regularizer(model, no_loss, penalty, {.micro_batch_size = 4, .generator = generator(8)});
  const auto report = regularizer.backward(input, input);
  const torch::Tensor gradient = flat_grad(model->parameters());
  clear_grad(model->parameters());
  const torch::Tensor x = input.clone().requires_grad_(true);
  const torch::Tensor value = penalty(model->forward(x), {x}, generator(8));
  value.backward();
  CHECK(relative_error(report.penalties[0].value, value) < 1e-12);
  CHECK(relative_error(gradient, flat_grad(model->parameters())) < 1e-12);
}

TEST_CASE("every floating-point tensor of the input counts, others pass", "[input_jacobian]") {
  torch::manual_seed(6);
  const torch::Tensor a = torch::randn({4, 3}, torch::kFloat64);
  const torch::Tensor b = torch::randn({4, 2}, torch::kFloat64);
  const torch::Tensor rows = torch::randint(5, {4});
  const torch::Tensor w = torch::randn({3, 2}, torch::kFloat64).requires_grad_(true);
  const torch::Tensor table = torch::randn({5, 2}, torch::kFloat64).requires_grad_(true);
  const microreg::FunctionModel model{
      [&](const torch::Tensor& first, const torch::Tensor& second, const torch::Tensor& index) {
        return first.matmul(w) + 2 * second + table.index_select(0, index);
      },
      {w, table}};
  const auto batch = std::make_tuple(a, b, rows);
  const auto estimator =
      GENERATE(microreg::Estimator(microreg::Exact{}), microreg::Estimator(microreg::CentralDifference{1e-3}));
  clear_grad({w, table});
  microreg::Regularizer regularizer(model, no_loss, InputJacobian{.expectation = Expectation::exact},
                                    {.micro_batch_size = 4, .estimator = estimator});
  const auto report = regularizer.backward(batch, a);
  CHECK(relative_error(report.penalties[0].value, w.detach().square().sum() + 8) < 1e-12);
  CHECK(relative_error(w.grad(), 2 * w) < 1e-9);

  microreg::Regularizer on_indices(
      microreg::FunctionModel{[&](const torch::Tensor& index) { return table.index_select(0, index); }, {table}},
      no_loss, InputJacobian{});
  CHECK(has(message_of<microreg::ModelError>([&] { (void)on_indices.backward(rows, a); }),
            {"input_jacobian", "floating-point", "embed"}));
  const torch::Tensor x = a.clone().requires_grad_(true);
  CHECK(has(message_of<microreg::OptionError>([&] { (void)InputJacobian{.projections = 0}(x * 2, {x}); }),
            {"InputJacobian.projections", "0", "at least 1"}));
}

TEST_CASE("the unsquared norm by hand", "[unsquared]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(4);
  const auto parameters = model->parameters();
  const auto check = [&](const auto& penalty, const torch::Tensor& squared, const torch::Tensor& functor) {
    clear_grad(parameters);
    const torch::Tensor loss = torch::cross_entropy_loss(model->forward(batch.input), batch.target);
    (loss + 0.7 * squared.sqrt()).backward();
    const torch::Tensor expected = flat_grad(parameters);
    clear_grad(parameters);
    microreg::Regularizer regularizer(model, cross_entropy, penalty, {.strength = 0.7});
    const auto report = regularizer.backward(batch.input, batch.target);
    CHECK(relative_error(flat_grad(parameters), expected) < 1e-12);
    CHECK(relative_error(report.penalties[0].value, squared.sqrt()) < 1e-12);
    CHECK(relative_error(report.penalties[0].micro_batch_norms[0], squared.sqrt()) < 1e-12);
    clear_grad(parameters);
    (torch::cross_entropy_loss(model->forward(batch.input), batch.target) + 0.7 * functor).backward();
    CHECK(relative_error(flat_grad(parameters), expected) < 1e-12);
    CHECK(relative_error(microreg::measure(model, cross_entropy, penalty, batch.input, batch.target).penalties[0].value,
                         squared.sqrt()) < 1e-12);
    return report.penalties[0].name;
  };
  const auto output = [&] { return model->forward(batch.input); };
  const auto squared_norm = [&](const torch::Tensor& scalar) {
    torch::Tensor sum = torch::zeros({}, torch::kFloat64);
    for (const torch::Tensor& g : torch::autograd::grad({scalar}, parameters, {}, true, true)) {
      sum = sum + g.square().sum();
    }
    return sum;
  };
  SECTION("one probe") {
    const microreg::Unsquared penalty{microreg::GradientNorm{}};
    CHECK(check(penalty, squared_norm(torch::cross_entropy_loss(output(), batch.target)),
                penalty(torch::cross_entropy_loss(output(), batch.target), parameters)) == "unsquared_gradient_norm");
  }
  SECTION("several probes: the root of their sum") {
    torch::Tensor sum = torch::zeros({}, torch::kFloat64);
    const torch::Tensor mean = output().mean(0);
    for (std::int64_t c = 0; c < networks::classes; ++c) {
      sum = sum + squared_norm(mean[c]);
    }
    const microreg::Unsquared penalty{microreg::JacobianNorm{}};
    check(penalty, sum, penalty(output(), parameters));
  }
  SECTION("by the input") {
    auto exact = InputJacobian{.expectation = Expectation::exact};
    const torch::Tensor x = batch.input.clone().requires_grad_(true);
    const microreg::Unsquared penalty{exact};
    check(penalty, by_definition(model, batch.input), penalty(model->forward(x), {x}));
  }
}

TEST_CASE("the unsquared norm of a zero gradient has a zero gradient", "[unsquared]") {
  const torch::Tensor w = torch::zeros({3}, torch::dtype(torch::kFloat64).requires_grad(true));
  // The gradient w of |w|^2 / 2 is zero at w = 0, where sqrt has no derivative.
  const torch::Tensor value = microreg::Unsquared{microreg::GradientNorm{}}(w.square().sum() / 2, {w});
  value.backward();
  CHECK(value.item<double>() == 0);
  CHECK(w.grad().equal(torch::zeros_like(w)));

  w.mutable_grad() = torch::Tensor();
  const auto loss = [](const torch::Tensor& output, const torch::Tensor&) { return output.square().sum() / 2; };
  const microreg::FunctionModel model{[&](const torch::Tensor&) { return w * 1.0; }, {w}};
  microreg::Regularizer regularizer(model, loss, microreg::Unsquared{microreg::GradientNorm{}});
  (void)regularizer.backward(torch::ones({2}), torch::ones({2}));
  CHECK(w.grad().equal(torch::zeros_like(w)));
}
