// The penalties that are sums over several probes: values and gradients from their definitions, written out here.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>

#include <cmath>
#include <type_traits>

using namespace helpers;
using microreg::Expectation;

namespace {

constexpr double strength = 0.7;

/// The squared gradient norm of `scalar` as a graph.
torch::Tensor squared_norm(const torch::Tensor& scalar, const std::vector<torch::Tensor>& parameters) {
  torch::Tensor sum = torch::zeros({}, torch::kFloat64);
  for (const torch::Tensor& g : torch::autograd::grad({scalar}, parameters, {}, true, true)) {
    sum = sum + g.square().sum();
  }
  return sum;
}

struct Scene {
  networks::Mlp model = networks::seeded_mlp();
  networks::Samples batch = networks::vectors(3);

  [[nodiscard]] torch::Tensor output() { return model->forward(batch.input); }

  /// One step on the whole batch and the functor, against an expected value with a graph.
  template <class Penalty, class Functor>
  void check(const Penalty& penalty, const torch::Tensor& expected, const Functor& functor) {
    const auto parameters = model->parameters();
    clear_grad(parameters);
    microreg::Regularizer regularizer(model, cross_entropy, penalty,
                                      {.strength = strength, .micro_batch_size = 128, .generator = generator(6)});
    const auto report = regularizer.backward(batch.input, batch.target);
    const torch::Tensor gradient = flat_grad(parameters);
    CHECK(relative_error(report.penalties[0].value, expected) < 1e-12);
    CHECK(relative_error(report.penalties[0].micro_batch_norms.square(), expected.unsqueeze(0)) < 1e-12);

    const torch::Tensor value = functor(output(), parameters);
    CHECK(relative_error(value, expected) < 1e-12);
    for (const torch::Tensor& scalar : {expected, value}) {
      clear_grad(parameters);
      (torch::cross_entropy_loss(output(), batch.target) + strength * scalar).backward();
      CHECK(relative_error(gradient, flat_grad(parameters)) < 1e-12);
    }
  }
};

/// The directions that UnitJacobian draws, made here once more.
std::vector<torch::Tensor> directions(std::int64_t count) {
  at::Generator from = generator(6);
  std::vector<torch::Tensor> result;
  for (std::int64_t k = 0; k < count; ++k) {
    const torch::Tensor normal = torch::empty({networks::classes}, torch::kFloat64).normal_(0, 1, from);
    result.push_back(normal / normal.square().sum().sqrt());
  }
  return result;
}

}  // namespace

TEST_CASE("several directions are averaged", "[several_probes]") {
  Scene scene;
  const bool scaled = GENERATE(false, true);
  const std::int64_t count = GENERATE(1, 3);
  const torch::Tensor mean = scene.output().mean(0);
  torch::Tensor expected = torch::zeros({}, torch::kFloat64);
  for (const torch::Tensor& u : directions(count)) {
    expected = expected + squared_norm((u * mean).sum(), scene.model->parameters());
  }
  expected = expected * (scaled ? 5.0 : 1.0) / static_cast<double>(count);
  const microreg::UnitJacobian penalty{.directions = count, .scale_by_outputs = scaled};
  scene.check(penalty, expected, [&](const torch::Tensor& output, const std::vector<torch::Tensor>& parameters) {
    return penalty(output, parameters, generator(6));
  });
}

TEST_CASE("the Jacobian norm is the sum over rows of J-bar", "[several_probes]") {
  Scene scene;
  torch::Tensor expected = torch::zeros({}, torch::kFloat64);
  const torch::Tensor mean = scene.output().mean(0);
  for (std::int64_t c = 0; c < networks::classes; ++c) {
    expected = expected + squared_norm(mean[c], scene.model->parameters());
  }
  scene.check(microreg::JacobianNorm{}, expected, microreg::JacobianNorm{});
}

TEST_CASE("scaled directions average to the Jacobian norm", "[several_probes]") {
  Scene scene;
  const auto parameters = scene.model->parameters();
  const double exact = microreg::JacobianNorm{}(scene.output(), parameters).item<double>();
  at::Generator draws = generator(12);
  const microreg::UnitJacobian penalty{.directions = 20, .scale_by_outputs = true};
  double mean = 0;
  double squares = 0;
  constexpr int repeats = 200;
  for (int i = 0; i < repeats; ++i) {
    const double value = penalty(scene.output(), parameters, draws).item<double>();
    mean += value / repeats;
    squares += value * value / repeats;
  }
  const double error = std::sqrt((squares - mean * mean) / repeats);
  CHECK(error < 0.02 * exact);
  CHECK(std::abs(mean - exact) < 4.5 * error);
}

TEST_CASE("several draws are averaged", "[several_probes]") {
  Scene scene;
  constexpr std::int64_t count = 3;
  at::Generator from = generator(6);
  torch::Tensor expected = torch::zeros({}, torch::kFloat64);
  for (std::int64_t k = 0; k < count; ++k) {
    const torch::Tensor labels = microreg::Categorical{}.sample(scene.output(), from);
    const torch::Tensor loss = torch::cross_entropy_loss(scene.output(), labels);
    expected = expected + squared_norm(loss, scene.model->parameters()) / static_cast<double>(count);
  }
  const microreg::FisherTrace<> penalty{.draws = count};
  scene.check(penalty, expected, [&](const torch::Tensor& output, const std::vector<torch::Tensor>& parameters) {
    return penalty(output, parameters, generator(6));
  });
}

TEST_CASE("the exact Fisher trace is the mean over every set of labels, and so is its gradient", "[several_probes]") {
  torch::manual_seed(2);
  torch::nn::Sequential model(torch::nn::Linear(2, 3), torch::nn::Tanh(), torch::nn::Linear(3, 3));
  model->to(torch::kFloat64);
  const auto parameters = model->parameters();
  const torch::Tensor x = torch::randn({3, 2}, torch::kFloat64);
  const torch::Tensor p = torch::softmax(model->forward(x), 1).detach();
  torch::Tensor expected = torch::zeros({}, torch::kFloat64);
  for (int code = 0; code < 27; ++code) {
    const torch::Tensor labels = helpers::tensor({code % 3, code / 3 % 3, code / 9}, torch::kInt64);
    const torch::Tensor probability = p.gather(1, labels.unsqueeze(1)).prod();
    expected = expected + probability * squared_norm(torch::cross_entropy_loss(model->forward(x), labels), parameters);
  }
  const microreg::FisherTrace<> penalty{.expectation = Expectation::exact};
  const torch::Tensor value = penalty(model->forward(x), parameters);
  CHECK(relative_error(value, expected) < 1e-12);
  clear_grad(parameters);
  expected.backward();
  const torch::Tensor gradient = flat_grad(parameters);
  clear_grad(parameters);
  value.backward();
  CHECK(relative_error(flat_grad(parameters), gradient) < 1e-12);

  // Through Regularizer, with a loss of gradient zero.
  clear_grad(parameters);
  const auto zero_loss = [](const torch::Tensor& output, const torch::Tensor&) { return (output * 0).sum(); };
  microreg::Regularizer regularizer(model, zero_loss, penalty, {.micro_batch_size = 3});
  CHECK(relative_error(regularizer.backward(x, x).penalties[0].value, expected) < 1e-12);
  CHECK(relative_error(flat_grad(parameters), gradient) < 1e-12);
}

#if !defined(__clang__) || __clang_major__ >= 17
TEST_CASE("options of FisherTrace can be given without its distribution", "[several_probes]") {
  const microreg::FisherTrace averaged{.draws = 2};
  const microreg::FisherTrace expected{.expectation = Expectation::exact};
  const microreg::FisherTrace binary{.distribution = microreg::Bernoulli{}, .draws = 3};
  STATIC_REQUIRE(std::is_same_v<decltype(averaged), const microreg::FisherTrace<microreg::Categorical>>);
  STATIC_REQUIRE(std::is_same_v<decltype(expected), const microreg::FisherTrace<microreg::Categorical>>);
  STATIC_REQUIRE(std::is_same_v<decltype(binary), const microreg::FisherTrace<microreg::Bernoulli>>);
  CHECK(averaged.draws == 2);
  CHECK(expected.expectation == Expectation::exact);
  CHECK(binary.draws == 3);
}
#endif

TEST_CASE("the exact Fisher trace of a dense output counts each position as a sample", "[several_probes]") {
  torch::manual_seed(3);
  const torch::Tensor w = torch::randn({2, 3, 2}, torch::kFloat64).requires_grad_(true);  // logits [M, C, positions]
  const torch::Tensor rows = w.transpose(1, 2).reshape({4, 3});
  const microreg::FisherTrace<> penalty{.expectation = Expectation::exact};
  CHECK(relative_error(penalty(w * 1.0, {w}), penalty(rows, {w})) < 1e-12);
  // Each logit is a parameter: tr(F) / N = sum over positions and classes of p |e_c - p|^2 over N^2.
  const torch::Tensor p = torch::softmax(rows.detach(), 1);
  const double expected = (1 - p.square().sum(1)).sum().item<double>() / 16;
  CHECK(penalty(rows, {w}).item<double>() == Approx(expected).epsilon(1e-12));
}

TEST_CASE("options of penalties with several probes are checked", "[several_probes]") {
  Scene scene;
  const auto message = [&](const auto& penalty) {
    return message_of<microreg::OptionError>([&] { (void)penalty(scene.output(), scene.model->parameters()); });
  };
  CHECK(has(message(microreg::FisherTrace<>{.draws = 0}), {"FisherTrace.draws", "0", "at least 1"}));
  CHECK(has(message(microreg::UnitJacobian{.directions = -2}), {"UnitJacobian.directions", "-2", "at least 1"}));
  CHECK(has(message(microreg::FisherTrace<microreg::Gaussian>{.expectation = Expectation::exact}),
            {"expectation", "Categorical", "draws"}));
}
