// Expectation: means over what is drawn, labels of FisherTrace and directions of UnitJacobian, and the exact ones.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>

#include <cmath>

using namespace helpers;

namespace {

/// The gradient of `scalar` in one vector, by plain autograd.
torch::Tensor gradient(const torch::Tensor& scalar, const std::vector<torch::Tensor>& parameters) {
  std::vector<torch::Tensor> parts;
  for (const torch::Tensor& part : torch::autograd::grad({scalar}, parameters, {}, /*retain_graph=*/true)) {
    parts.push_back(part.flatten());
  }
  return torch::cat(parts);
}

constexpr std::int64_t samples = 3, outcomes = 3;

struct Tiny {
  Tiny() {
    torch::manual_seed(31);
    x = torch::randn({samples, 2}, torch::kFloat64);
    model->push_back(torch::nn::Linear(2, 3));
    model->push_back(torch::nn::Tanh());
    model->push_back(torch::nn::Linear(3, outcomes));
    model->to(torch::kFloat64);
    output = model->forward(x);
  }
  torch::nn::Sequential model;
  torch::Tensor x, output;
};

/// tr(F) / M for a categorical output: sum over samples and classes of p ||grad log p||^2, over M^2.
double exact_fisher_trace(const Tiny& tiny) {
  const torch::Tensor log_p = torch::log_softmax(tiny.output, 1);
  double trace = 0;
  for (std::int64_t i = 0; i < samples; ++i) {
    for (std::int64_t c = 0; c < outcomes; ++c) {
      const torch::Tensor score = gradient(log_p[i][c], tiny.model->parameters());
      trace += log_p[i][c].exp().item<double>() * score.square().sum().item<double>();
    }
  }
  return trace / (samples * samples);
}

}  // namespace

TEST_CASE("the Fisher trace, averaged over every set of labels, is tr(F) / |M|", "[expectation]") {
  const Tiny tiny;
  const torch::Tensor p = torch::softmax(tiny.output.detach(), 1);
  double expectation = 0;
  double total_probability = 0;
  for (int code = 0; code < 27; ++code) {
    const torch::Tensor labels = helpers::tensor({code % 3, code / 3 % 3, code / 9}, torch::kInt64);
    const microreg::FisherTrace given{microreg::Distribution{
        [&](const torch::Tensor&, const auto&) { return labels; },
        [](const torch::Tensor& logits, const torch::Tensor& y) { return torch::cross_entropy_loss(logits, y); }}};
    const double probability = p.gather(1, labels.unsqueeze(1)).prod().item<double>();
    expectation += probability * given(tiny.output, tiny.model->parameters()).item<double>();
    total_probability += probability;
  }
  CHECK(total_probability == Approx(1.0));
  CHECK(expectation == Approx(exact_fisher_trace(tiny)).epsilon(1e-12));
}

TEST_CASE("the Fisher trace, averaged over its own draws, is tr(F) / |M|", "[expectation]") {
  const Tiny tiny;
  at::Generator draws = generator(32);
  const auto [mean, error] = monte_carlo(
      3000, [&] { return microreg::FisherTrace{}(tiny.output, tiny.model->parameters(), draws).item<double>(); });
  CHECK(error < 0.05 * mean);
  CHECK(std::abs(mean - exact_fisher_trace(tiny)) < 4.5 * error);
  const microreg::FisherTrace<> exact{.expectation = microreg::Expectation::exact};
  CHECK(exact(tiny.output, tiny.model->parameters()).item<double>() == Approx(exact_fisher_trace(tiny)).epsilon(1e-12));
}

TEST_CASE("the Fisher trace of a Gaussian, averaged over its draws", "[expectation]") {
  // F = J^T J / deviation^2 for each sample, so tr(F) / M = sum over samples of ||J_i||_F^2 / (M^2 deviation^2).
  const Tiny tiny;
  const double deviation = 0.7;
  double expected = 0;
  for (std::int64_t i = 0; i < samples; ++i) {
    for (std::int64_t c = 0; c < outcomes; ++c) {
      expected += gradient(tiny.output[i][c], tiny.model->parameters()).square().sum().item<double>();
    }
  }
  expected /= samples * samples * deviation * deviation;
  at::Generator draws = generator(33);
  const microreg::FisherTrace fisher{microreg::Gaussian{deviation}};
  const auto [mean, error] =
      monte_carlo(3000, [&] { return fisher(tiny.output, tiny.model->parameters(), draws).item<double>(); });
  CHECK(std::abs(mean - expected) < 4.5 * error);
}

TEST_CASE("the unit Jacobian, averaged over directions, is ||J-bar||_F^2 / C", "[expectation]") {
  const Tiny tiny;
  double frobenius = 0;
  for (std::int64_t c = 0; c < outcomes; ++c) {
    frobenius += gradient(tiny.output.mean(0)[c], tiny.model->parameters()).square().sum().item<double>();
  }
  at::Generator draws = generator(34);
  const auto [mean, error] = monte_carlo(
      3000, [&] { return microreg::UnitJacobian{}(tiny.output, tiny.model->parameters(), draws).item<double>(); });
  CHECK(error < 0.05 * mean);
  CHECK(std::abs(mean - frobenius / outcomes) < 4.5 * error);
}

TEST_CASE("each micro-batch draws a direction and labels of its own", "[expectation]") {
  const Tiny tiny;
  const torch::Tensor twice = torch::cat({tiny.x, tiny.x});
  microreg::Regularizer regularizer(
      tiny.model, [](const torch::Tensor& output, const torch::Tensor&) { return output.square().mean(); },
      microreg::UnitJacobian{} + microreg::FisherTrace{}, {.micro_batch_size = samples, .generator = generator(35)});
  const auto report = regularizer.backward(twice, twice);
  for (const auto& penalty : report.penalties) {
    const torch::Tensor norms = penalty.micro_batch_norms;
    CHECK(std::abs((norms[0] - norms[1]).item<double>()) > 1e-6);
  }
}
