// Unsquared: the norm itself, of whatever penalty.
#include "penalty_helpers.hpp"

using namespace helpers;
using namespace penalty_helpers;

TEST_CASE("the unsquared norm of a network whose derivatives are written down", "[unsquared]") {
  const TanhNetwork network;
  const microreg::Unsquared penalty{microreg::GradientNorm{}};
  network.check(
      penalty, [&](const Tensor&, const Tensor& loss) { return penalty(loss, {network.w}); },
      [&](const Tensor& rows, const Tensor& labels) {
        auto [value, slope, norm] = network.squared_norm(rows, {network.of_loss(labels)});
        return TanhNetwork::ByHand{norm, slope / (2 * norm), norm};
      });
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
  SECTION("one probe") {
    const microreg::Unsquared penalty{microreg::GradientNorm{}};
    CHECK(check(penalty, squared_norm_by_hand(torch::cross_entropy_loss(output(), batch.target), parameters),
                penalty(torch::cross_entropy_loss(output(), batch.target), parameters)) == "unsquared_gradient_norm");
  }
  SECTION("several probes: the root of their sum") {
    torch::Tensor sum = torch::zeros({}, torch::kFloat64);
    const torch::Tensor mean = output().mean(0);
    for (std::int64_t c = 0; c < networks::classes; ++c) {
      sum = sum + squared_norm_by_hand(mean[c], parameters);
    }
    const microreg::Unsquared penalty{microreg::JacobianNorm{}};
    check(penalty, sum, penalty(output(), parameters));
  }
  SECTION("by the input") {
    auto exact = microreg::InputJacobian{.expectation = microreg::Expectation::exact};
    const torch::Tensor x = batch.input.clone().requires_grad_(true);
    const microreg::Unsquared penalty{exact};
    check(penalty, input_jacobian_by_definition(model, batch.input), penalty(model->forward(x), {x}));
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

TEST_CASE("the unsquared norm draws as the penalty inside", "[unsquared]") {
  Scene scene;
  const microreg::UnitJacobian inside{.directions = 3};
  const auto parameters = scene.model->parameters();
  const Tensor mean = scene.output().mean(0);
  Tensor squares = torch::zeros({}, torch::kFloat64);
  for (const Tensor& u : directions(3, networks::classes, generator(7))) {
    squares += squared_norm_by_hand(mean.dot(u), parameters).detach() / 3;
  }
  const microreg::Unsquared penalty{inside};
  CHECK(penalty.name() == "unsquared_unit_jacobian");
  CHECK(relative_error(penalty(scene.output(), parameters, generator(7)), squares.sqrt()) < 1e-12);
}
