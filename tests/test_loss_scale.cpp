// The loss scale: a fixed one changes nothing but what underflows, a dynamic one finds where nothing overflows.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

using namespace helpers;

TEST_CASE("a loss scale changes nothing but what underflows", "[loss scale]") {
  torch::manual_seed(4);
  networks::Mlp model;
  model->to(torch::kFloat64);
  const torch::Tensor x = torch::randn({8, 6}, torch::kFloat64);
  const torch::Tensor y = torch::randint(networks::classes, {8});
  const auto penalty = GENERATE(0, 1, 2);
  const auto expression = [&]() -> microreg::AnyPenalty<> {
    if (penalty == 0) {
      return microreg::GradientNorm{};
    }
    if (penalty == 1) {
      return 0.3 * microreg::AverageJacobian{} + microreg::Unsquared{microreg::GradientNorm{}};
    }
    return microreg::InputJacobian{} + 0.0 * microreg::AverageJacobian{};
  };
  const auto found = [&](double scale, double strength, microreg::ParameterSelection select) {
    microreg::Report report;
    torch::manual_seed(9);  // for the direction of InputJacobian
    const torch::Tensor gradient = grad_after(*model, [&] {
      microreg::Regularizer<> regularizer(
          model, cross_entropy, expression(),
          {.strength = strength, .micro_batch_size = 4, .select = std::move(select), .loss_scale = scale});
      report = regularizer.backward(x, y);
    });
    std::vector<torch::Tensor> parts{gradient, report.loss.reshape(1).cpu(), report.gradient_norm.reshape(1).cpu()};
    for (const auto& each : report.penalties) {
      parts.push_back(each.value.reshape(1).cpu());
    }
    return torch::cat(parts);
  };
  const auto weights = [](const std::string&, const torch::Tensor& p) { return p.dim() > 1; };
  for (const double strength : {0.2, 0.0}) {
    CAPTURE(penalty, strength);
    CHECK(relative_error(found(512, strength, {}), found(1, strength, {})) < 1e-14);
    CHECK(relative_error(found(512, strength, weights), found(1, strength, weights)) < 1e-14);
  }
  const auto refused = [&](const microreg::RegularizerOptions& options) {
    return message_of<microreg::OptionError>(
        [&] { microreg::Regularizer<>(model, cross_entropy, microreg::GradientNorm{}, options); });
  };
  CHECK(has(refused({.loss_scale = 0}), {"loss_scale", "0", "positive"}));
  {
    microreg::Regularizer<> constant(model, cross_entropy, microreg::GradientNorm{}, {.loss_scale = 8});
    CHECK(has(message_of<microreg::OptionError>([&] { constant.set_loss_scale(4); }), {"DynamicLossScale"}));
    microreg::Regularizer<> follows(model, cross_entropy, microreg::GradientNorm{},
                                    {.loss_scale = microreg::DynamicLossScale{}});
    for (const double wrong : {0.0, -1.0, std::nan(""), std::numeric_limits<double>::infinity()}) {
      CHECK(has(message_of<microreg::OptionError>([&] { follows.set_loss_scale(wrong); }),
                {"set_loss_scale()", "above 0"}));
      CHECK_FALSE(follows.loss_scale().defined());
    }
    follows.set_loss_scale(256);
    CHECK(follows.loss_scale().item<double>() == 256);
  }
  CHECK(has(refused({.estimator = microreg::ForwardDifference{}, .loss_scale = 8}), {"loss_scale", "Exact"}));
}

TEST_CASE("a dynamic loss scale finds where nothing overflows", "[loss scale]") {
  using microreg::DynamicLossScale;
  // float16 ends at 65504, and the backward pass of this loss goes through 50 S: 1024 fits, 2048 does not.
  const double fits = 1024;
  torch::Tensor w = torch::full({1000}, 1e-4, torch::kHalf).requires_grad_();
  microreg::FunctionModel model{[&](const torch::Tensor& x) { return w.square() * x.sum() * 50; }, {w}};
  bool fails = false;
  const auto loss = [&](const torch::Tensor& output, const torch::Tensor&) {
    if (fails) {
      throw std::runtime_error("a loss that fails");
    }
    return output.to(torch::kFloat).sum();
  };
  const torch::Tensor x = torch::ones({2}, torch::kHalf);
  const torch::Tensor y = torch::zeros({2});
  const auto make = [&](const microreg::LossScale& scale, microreg::CheckFinite check) {
    return microreg::Regularizer<>(
        model, loss, microreg::GradientNorm{},
        {.strength = 1e-3, .micro_batch_size = 1, .check_finite = check, .loss_scale = scale});
  };
  const auto scale_of = [](const microreg::Regularizer<>& regularizer) {
    return regularizer.loss_scale().item<double>();
  };
  auto fixed = make(64, microreg::CheckFinite::on_cpu);
  clear_grad({w});
  const microreg::Report expected = fixed.backward(x, y);
  const torch::Tensor gradient = w.grad().clone();

  const auto check = GENERATE(microreg::CheckFinite::on_cpu, microreg::CheckFinite::never);
  const bool looks = check == microreg::CheckFinite::on_cpu && test_device().is_cpu();
  auto regularizer = make(DynamicLossScale{.start = 8 * fits, .interval = 2}, check);
  CHECK_FALSE(regularizer.loss_scale().defined());
  microreg::Regularizer<> copy;
  for (const double scale : {8 * fits, 4 * fits, 2 * fits, fits, fits, 2 * fits, fits}) {
    CAPTURE(scale);
    w.mutable_grad() = torch::full({1000}, 0.25, torch::kHalf);
    const microreg::Report report = regularizer.backward(x, y);
    CHECK(report.loss_scale.item<double>() == scale);
    CHECK(report.overflow.item<bool>() == (scale > fits));
    CHECK(report.skipped == (scale > fits && looks));
    const torch::Tensor added = scale > fits ? torch::zeros({1000}) : gradient.to(torch::kFloat);
    CHECK(relative_error(w.grad().to(torch::kFloat), 0.25 + added) < 1e-3);
    if (scale > fits) {
      CHECK(w.grad().eq(0.25).all().item<bool>());
      CHECK(report.gradient_norm.item<double>() == 0);
    } else {
      CHECK(report.penalties[0].value.item<double>() ==
            Approx(expected.penalties[0].value.item<double>()).epsilon(1e-3));
    }
    if (regularizer.step() == 2) {
      copy = regularizer;
    }
  }
  CHECK(regularizer.skipped() == 4);
  CHECK(regularizer.step() == 7);
  // A copy goes its own way, and a run that resumes begins where it is told to.
  CHECK(copy.skipped() == 2);
  CHECK(scale_of(copy) == 2 * fits);
  copy.set_loss_scale(8);
  CHECK(copy.backward(x, y).loss_scale.item<double>() == 8);

  // What fails changes nothing: not the scale, and no step is counted.
  const double before = scale_of(regularizer);
  fails = true;
  CHECK_THROWS_AS(regularizer.backward(x, y), std::runtime_error);
  CHECK(scale_of(regularizer) == before);
  CHECK(regularizer.step() == 7);
  fails = false;
  // No scale helps where the loss itself is infinite.
  if (looks) {
    CHECK_THROWS_AS(regularizer.backward(x * INFINITY, y), microreg::NonFiniteError);
    CHECK(scale_of(regularizer) == before);
  }
}

TEST_CASE("a dynamic loss scale in a loop of one's own, and what is no such scale", "[loss scale]") {
  using microreg::DynamicLossScale;
  torch::Tensor w = torch::full({10}, 1e-2, torch::kHalf).requires_grad_();
  const auto loss = [&] { return (w.square() * 50).to(torch::kFloat).sum(); };
  microreg::Penalised penalised({w}, microreg::GradientNorm{},
                                {.strength = 1e-2,
                                 .check_finite = microreg::CheckFinite::always,
                                 .loss_scale = DynamicLossScale{.start = 2048}});  // the Hessian, S 100 g, needs 512
  CHECK(penalised.backward(loss()).skipped);
  CHECK(penalised.backward(loss()).skipped);
  CHECK_FALSE(w.grad().defined());
  CHECK_FALSE(penalised.backward(loss()).skipped);
  CHECK(penalised.skipped() == 2);
  CHECK(relative_error(w.grad().to(torch::kFloat), (100 + 2e-2 * 1e4) * w.detach().to(torch::kFloat)) < 2e-3);
  const microreg::Part first{.index = 0, .count = 2};
  CHECK(has(message_of<microreg::OptionError>([&] { penalised.backward(first, loss()); }),
            {"loss_scale is dynamic", "part 0 of 2"}));
  const auto refused = [&](const DynamicLossScale& scale) {
    return message_of<microreg::OptionError>(
        [&] { microreg::Penalised({w}, microreg::GradientNorm{}, {.loss_scale = scale}); });
  };
  CHECK(has(refused({.start = 0}), {"loss_scale is 0"}));
  CHECK(has(refused({.growth = 0.5}), {"growth 0.5"}));
  CHECK(has(refused({.backoff = 1}), {"backoff 1"}));
  CHECK(has(refused({.interval = 0}), {"interval 0"}));
}
