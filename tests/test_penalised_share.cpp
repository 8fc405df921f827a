// Sampling: which micro-batches are penalised, and that the gradient stays unbiased.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>
#include <microreg/step/sampling.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <set>
#include <vector>

using namespace helpers;

namespace {

constexpr std::int64_t samples = 22;  // micro-batches of 4, the last one of 2

struct Scene {
  networks::Mlp model = networks::seeded_mlp();
  networks::Samples batch = networks::vectors(samples);

  microreg::Report step(microreg::RegularizerOptions options, std::int64_t at_step = 0) {
    options.micro_batch_size = 4;
    clear_grad(model->parameters());
    microreg::Regularizer regularizer(model, cross_entropy, microreg::GradientNorm{}, options);
    regularizer.set_step(at_step);
    return regularizer.backward(batch.input, batch.target);
  }

  [[nodiscard]] torch::Tensor gradient() const { return flat_grad(model->parameters()); }

  /// The gradient of the penalty on micro-batch i alone, without its weight.
  torch::Tensor penalty_gradient(std::int64_t i) {
    const std::int64_t size = std::min<std::int64_t>(4, samples - 4 * i);
    const auto input = batch.input.narrow(0, 4 * i, size);
    const auto target = batch.target.narrow(0, 4 * i, size);
    const auto parameters = model->parameters();
    const auto loss = torch::cross_entropy_loss(model->forward(input), target);
    torch::Tensor squared = torch::zeros({}, torch::kFloat64);
    for (const torch::Tensor& g : torch::autograd::grad({loss}, parameters, {}, true, true)) {
      squared = squared + g.square().sum();
    }
    clear_grad(parameters);
    squared.backward();
    return gradient();
  }
};

}  // namespace

TEST_CASE("a share of the micro-batches is penalised with more weight", "[penalised]") {
  Scene scene;
  const auto estimator =
      GENERATE(microreg::Estimator(microreg::Exact{}), microreg::Estimator(microreg::CentralDifference{}));
  const double share = GENERATE(0.5, 0.6, 0.2);  // of 6: exactly 3, 3 or 4, 1 or 2
  (void)scene.step({.strength = 0});
  const torch::Tensor plain = scene.gradient();
  for (std::int64_t step = 0; step < 4; ++step) {
    const auto report = scene.step({.strength = 0.3, .estimator = estimator, .sampling = {.share = share}}, step);
    torch::Tensor expected = scene.gradient() - plain;
    const auto chosen = report.penalised;
    REQUIRE_FALSE(chosen.empty());
    CHECK(std::abs(static_cast<double>(chosen.size()) - 6 * share) < 1);
    CHECK(report.penalties[0].micro_batch_norms.size(0) == static_cast<std::int64_t>(chosen.size()));
    CHECK(report.micro_batches() == 6);
    torch::Tensor sum = torch::zeros_like(plain);
    double value = 0;
    for (std::size_t k = 0; k < chosen.size(); ++k) {
      const double weight = (chosen[k] == 5 ? 2.0 : 4.0) / samples * 6.0 / static_cast<double>(chosen.size());
      sum += weight * scene.penalty_gradient(chosen[k]);
      value += weight * std::pow(report.penalties[0].micro_batch_norms[static_cast<std::int64_t>(k)].item<double>(), 2);
    }
    CHECK(relative_error(expected, 0.3 * sum) < 1e-7);
    CHECK(report.penalties[0].value.item<double>() == Approx(value).epsilon(1e-12));
  }
}

TEST_CASE("the choice of micro-batches is unbiased", "[penalised]") {
  const double share = GENERATE(1.0, 0.75, 0.4, 0.1);
  const std::int64_t count = GENERATE(1, 2, 7);
  constexpr int steps = 4000;
  std::vector<double> mean(static_cast<std::size_t>(count), 0.0);
  std::vector<double> squares(mean);
  for (int step = 0; step < steps; ++step) {
    const auto choice = microreg::detail::choose_penalised({.share = share, .seed = 4}, step, count);
    for (std::size_t i = 0; i < mean.size(); ++i) {
      const double factor = choice.chosen[i] ? choice.factor : 0.0;
      mean[i] += factor / steps;
      squares[i] += factor * factor / steps;
    }
  }
  for (std::size_t i = 0; i < mean.size(); ++i) {
    const double error = std::sqrt(std::max(squares[i] - mean[i] * mean[i], 0.0) / steps);
    CAPTURE(share, count, i, mean[i], error);
    CHECK(std::abs(mean[i] - 1) <= 4.5 * error + 1e-12);
    CHECK(error < 0.06);
  }
}

TEST_CASE("every subset is as likely as another", "[penalised]") {
  std::map<std::vector<bool>, int> seen;
  constexpr int steps = 6000;
  for (int step = 0; step < steps; ++step) {
    ++seen[microreg::detail::choose_penalised({.share = 0.5}, step, 4).chosen];
  }
  CHECK(seen.size() == 6);  // 2 of 4
  for (const auto& [subset, times] : seen) {
    CHECK(std::abs(times - steps / 6.0) < 4.5 * std::sqrt(steps * (1 / 6.0) * (5 / 6.0)));
  }
}

TEST_CASE("the choice depends on seed and step alone", "[penalised]") {
  Scene scene;
  const auto chosen = [&](std::uint64_t seed, std::int64_t step) {
    return scene.step({.sampling = {.share = 0.5, .seed = seed}}, step).penalised;
  };
  CHECK(chosen(1, 7) == chosen(1, 7));
  std::set<std::vector<std::int64_t>> by_step;
  std::set<std::vector<std::int64_t>> by_seed;
  for (std::int64_t i = 0; i < 10; ++i) {
    by_step.insert(chosen(1, i));
    by_seed.insert(chosen(static_cast<std::uint64_t>(i) << 32U, 0));
  }
  CHECK(by_step.size() > 4);
  CHECK(by_seed.size() > 4);
}

TEST_CASE("every k-th step is penalised with k times the weight", "[penalised]") {
  Scene scene;
  (void)scene.step({.strength = 0});
  const torch::Tensor plain = scene.gradient();
  const auto full = scene.step({.strength = 0.3});
  const torch::Tensor penalty = scene.gradient() - plain;
  CHECK(full.penalised.size() == 6);
  for (std::int64_t step = 0; step < 7; ++step) {
    const auto report = scene.step({.strength = 0.3, .sampling = {.every = 3}}, step);
    if (step % 3 == 0) {
      CHECK(relative_error(scene.gradient() - plain, 3 * penalty) < 1e-12);
      CHECK(relative_error(report.penalties[0].value, 3 * full.penalties[0].value) < 1e-12);
      CHECK(relative_error(report.penalties[0].micro_batch_norms, full.penalties[0].micro_batch_norms) < 1e-12);
      CHECK(report.penalised.size() == 6);
    } else {
      CHECK(relative_error(scene.gradient(), plain) < 1e-14);
      CHECK(report.penalties[0].value.item<double>() == 0);
      CHECK(report.penalties[0].micro_batch_norms.sizes() == torch::IntArrayRef{6});
      CHECK(report.penalties[0].micro_batch_norms.abs().sum().item<double>() == 0);
      CHECK(report.penalised.empty());
    }
  }
}

TEST_CASE("a penalty that is not finite is reported with its own micro-batch", "[penalised]") {
  if (skipped_off_the_cpu("values are looked at on the CPU unless asked")) {
    return;
  }
  Scene scene;
  scene.batch.target[21] = networks::classes;  // a mark in the last micro-batch, which makes its penalty NaN
  const double not_a_number = std::numeric_limits<double>::quiet_NaN();
  const microreg::SquaredGradientNorm on_target{[&](const torch::Tensor& output, const torch::Tensor& y) {
    return output.mean() * torch::where(y.max() == networks::classes, not_a_number, 1.0);
  }};
  const auto loss = [](const torch::Tensor& output, const torch::Tensor&) { return output.square().mean(); };
  int failures = 0;
  for (std::int64_t step = 0; step < 20; ++step) {
    microreg::Regularizer regularizer(scene.model, loss, on_target,
                                      {.micro_batch_size = 4, .sampling = {.share = 0.4}});
    regularizer.set_step(step);
    try {
      const auto report = regularizer.backward(scene.batch.input, scene.batch.target);
      CHECK(std::find(report.penalised.begin(), report.penalised.end(), 5) == report.penalised.end());
    } catch (const microreg::NonFiniteError& error) {
      CHECK(error.micro_batch() == 5);
      ++failures;
    }
  }
  CHECK(failures > 0);
}

TEST_CASE("measure looks at every micro-batch", "[penalised]") {
  Scene scene;
  const auto report = microreg::measure(scene.model, cross_entropy, microreg::GradientNorm{}, scene.batch.input,
                                        scene.batch.target, {.micro_batch_size = 4});
  CHECK(report.penalised.size() == 6);
  CHECK(report.penalties[0].micro_batch_norms.size(0) == 6);
}
