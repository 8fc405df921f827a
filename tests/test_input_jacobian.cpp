// InputJacobian against closed forms and its definition.
#include "penalty_helpers.hpp"

#include <cmath>
#include <tuple>

using namespace helpers;
using microreg::Expectation;
using microreg::InputJacobian;
using penalty_helpers::input_jacobian_by_definition;

namespace {

const auto no_loss = [](const torch::Tensor& output, const torch::Tensor&) { return (output * 0).sum(); };

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
    const torch::Tensor expected = input_jacobian_by_definition(model, input);
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
  const double expected = input_jacobian_by_definition(model, input).template item<double>();
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

TEST_CASE("the input Jacobian names what it cannot use", "[input_jacobian]") {
  penalty_helpers::check_refusals(InputJacobian{});
}
