// AnyPenalty: a penalty chosen at run time is the same as one chosen at compile time.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>

#include <map>
#include <string>
#include <vector>

using namespace helpers;
using microreg::AnyPenalty;

namespace {

template <class Penalty>
torch::Tensor gradient(const networks::Mlp& model, const networks::Samples& batch, const Penalty& penalty) {
  clear_grad(model->parameters());
  microreg::Regularizer regularizer(model, cross_entropy, penalty,
                                    {.strength = 0.3, .micro_batch_size = 4, .generator = generator(4)});
  (void)regularizer.backward(batch.input, batch.target);
  return flat_grad(model->parameters());
}

}  // namespace

static_assert(microreg::PenaltyExpression<AnyPenalty<>>);
static_assert(!microreg::Penalty<AnyPenalty<>>);

TEST_CASE("AnyPenalty holds any penalty, sum and strength", "[any_penalty]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(10);
  const auto same = [&](const AnyPenalty<>& any, const auto& penalty) {
    CHECK(same_bits(gradient(model, batch, any), gradient(model, batch, penalty)));
  };
  same(microreg::GradientNorm{}, microreg::GradientNorm{});
  same(microreg::FisherTrace{}, microreg::FisherTrace{});
  same(0.5 * microreg::UnitJacobian{}, 0.5 * microreg::UnitJacobian{});
  same(microreg::Unsquared{microreg::GradientNorm{}}, microreg::Unsquared{microreg::GradientNorm{}});
  same(microreg::InputJacobian{}, microreg::InputJacobian{});
  const auto sum = 0.5 * microreg::GradientNorm{} + microreg::AverageJacobian{};
  same(sum, sum);
  same(microreg::SquaredGradientNorm{[](const torch::Tensor& output) { return output.logsumexp(1).mean(); }},
       microreg::SquaredGradientNorm{[](const torch::Tensor& output) { return output.logsumexp(1).mean(); }});

  AnyPenalty<> built = 0.5 * microreg::GradientNorm{};
  CHECK(built.size() == 1);
  built += microreg::AverageJacobian{};
  same(built, sum);
  same(AnyPenalty<>(0.5 * microreg::GradientNorm{}) + microreg::AverageJacobian{}, sum);
  same(0.5 * AnyPenalty<>(sum), 0.25 * microreg::GradientNorm{} + 0.5 * microreg::AverageJacobian{});
  const AnyPenalty deduced = microreg::GradientNorm{};
  same(deduced, microreg::GradientNorm{});
}

TEST_CASE("strengths of an AnyPenalty multiply step by step", "[any_penalty]") {
  const AnyPenalty<> scheduled = microreg::Strength([](std::int64_t step) { return 0.1 * static_cast<double>(step); }) *
                                 AnyPenalty<>(0.5 * microreg::GradientNorm{});
  CHECK(scheduled.terms()[0].strength.at(4) == Approx(0.2));
  CHECK((microreg::Strength(0.5) * microreg::Strength(0.2)).at(9) == Approx(0.1));
}

TEST_CASE("no penalty is plain training", "[any_penalty]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(10);
  const torch::Tensor found = gradient(model, batch, AnyPenalty<>());
  clear_grad(model->parameters());
  torch::cross_entropy_loss(model->forward(batch.input), batch.target).backward();
  CHECK(relative_error(found, flat_grad(model->parameters())) < 1e-13);
}

TEST_CASE("AnyPenalty for other types names them", "[any_penalty]") {
  torch::manual_seed(3);
  torch::nn::Linear layer(6, networks::classes);
  using Pair = std::pair<torch::Tensor, torch::Tensor>;
  const auto forward = [&](const torch::Tensor& x) { return Pair{layer(x), layer(x).tanh()}; };
  const auto loss = [](const Pair& output, const torch::Tensor& y) {
    return torch::cross_entropy_loss(output.first, y);
  };
  const AnyPenalty<torch::Tensor, Pair> penalty =
      microreg::SquaredGradientNorm{[](const Pair& output) { return output.second.mean(); }};
  microreg::Regularizer regularizer(microreg::FunctionModel{forward, layer->parameters()}, loss, penalty);
  const auto report = regularizer.backward(torch::randn({4, 6}), torch::randint(networks::classes, {4}));
  CHECK(report.penalties[0].value.item<double>() > 0);
}
