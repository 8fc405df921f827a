// Autocast: what the guard switches and takes back, and steps under it.
#include "helpers.hpp"
#include "networks.hpp"

#include <ATen/autocast_mode.h>
#include <microreg/microreg.hpp>

#include <stdexcept>
#include <utility>

using namespace helpers;

TEST_CASE("Autocast takes its state back, also nested and after an error", "[autocast]") {
  const auto state = [] {
    return std::make_pair(at::autocast::is_autocast_enabled(at::kCPU), at::autocast::get_autocast_dtype(at::kCPU));
  };
  const auto before = state();
  try {
    const microreg::Autocast outer(at::kCPU, at::kBFloat16);
    CHECK(torch::matmul(torch::ones({2, 2}, at::kCPU), torch::ones({2, 2}, at::kCPU)).scalar_type() ==
          torch::kBFloat16);
    {
      const microreg::Autocast inner(at::kCPU, at::kHalf);
      CHECK(state().second == at::kHalf);
    }
    CHECK(state() == std::make_pair(true, at::kBFloat16));
    throw std::runtime_error("in the middle");
  } catch (const std::runtime_error&) {
    CHECK(state() == before);
  }
  CHECK(has(message_of<microreg::OptionError>([] { const microreg::Autocast wrong(at::kCPU, at::kFloat); }),
            {"Float", "BFloat16", "Half"}));
  CHECK(state() == before);
}

TEST_CASE("a step under Autocast: by the option, around forward and loss, around all", "[autocast]") {
  torch::manual_seed(4);
  // Smooth: which side of a kink an element lies on changes with the last digits, and the gradient with it, by per
  // cents.
  networks::Cnn model(networks::Norm::batch, networks::Activation::smooth);
  const torch::Tensor x = torch::randn({8, 2, 6, 6});
  const torch::Tensor y = torch::randint(networks::classes, {8});
  const auto penalty = microreg::GradientNorm{} + 0.5 * microreg::AverageJacobian{};
  const microreg::RegularizerOptions options{.strength = 0.1, .micro_batch_size = 4};
  const auto device = test_device().type();
  microreg::Report report;
  const auto with = [&](const microreg::RegularizerOptions& chosen) {
    microreg::Regularizer regularizer(model, cross_entropy, penalty, chosen);
    report = regularizer.backward(x, y);
  };
  const torch::Tensor full = grad_after(*model, [&] { with(options); });
  microreg::RegularizerOptions half = options;
  half.autocast = torch::kBFloat16;
  const torch::Tensor by_option = grad_after(*model, [&] { with(half); });
  CHECK(relative_error(by_option, full) < 0.01);
  CHECK(relative_error(by_option, full) > 1e-5);  // it did something
  CHECK(report.penalties[0].value.scalar_type() == torch::kFloat32);

  const torch::Tensor around_all = grad_after(*model, [&] {
    const microreg::Autocast guard(device);
    with(options);
  });
  CHECK(same_bits(around_all, by_option));

  half.fused = false;
  const torch::Tensor stock = grad_after(*model, [&] { with(half); });
  CHECK(relative_error(by_option, stock) < 0.02);

  CHECK(has(message_of<microreg::OptionError>([&] { with({.autocast = torch::kFloat64}); }), {"autocast", "Double"}));
}

TEST_CASE("a difference under Autocast proves itself, or is refused", "[autocast]") {
  torch::manual_seed(4);
  networks::Cnn model(networks::Norm::batch, networks::Activation::kinked);
  const torch::Tensor x = torch::randn({32, 2, 6, 6});
  const torch::Tensor y = torch::randint(networks::classes, {32});
  const auto penalty_part = [&](const microreg::Estimator& estimator) {
    const auto with = [&](double strength) {
      return grad_after(*model, [&] {
        microreg::Regularizer regularizer(model, cross_entropy, microreg::GradientNorm{},
                                          {.strength = strength, .estimator = estimator, .autocast = torch::kBFloat16});
        (void)regularizer.backward(x, y);
      });
    };
    return (with(1) - with(0)).detach();
  };
  const torch::Tensor exact = penalty_part(microreg::Exact{});
  for (const auto& estimator :
       {microreg::Estimator(microreg::ForwardDifference{}), microreg::Estimator(microreg::CentralDifference{})}) {
    try {
      const torch::Tensor found = penalty_part(estimator);
      CHECK(relative_error(found, exact) < 0.1);
    } catch (const microreg::DifferenceError& error) {
      CHECK(has(error.what(), {"off by", "Exact"}));
    }
  }
}

TEST_CASE("a difference that gives way to double backward keeps what float16 would lose", "[autocast]") {
  torch::manual_seed(4);
  torch::nn::Sequential model(torch::nn::Linear(6, 16), torch::nn::BatchNorm1d(16), torch::nn::Tanh(),
                              torch::nn::Linear(16, networks::classes));
  const torch::Tensor x = torch::randn({8, 6});
  const torch::Tensor y = torch::randint(networks::classes, {8});
  const auto penalty_part = [&](const microreg::Estimator& estimator, double strength,
                                std::optional<at::ScalarType> type) {
    const auto with = [&](double chosen) {
      return grad_after(*model, [&] {
        microreg::Regularizer regularizer(model, cross_entropy, microreg::GradientNorm{},
                                          {.strength = chosen, .estimator = estimator, .autocast = type});
        (void)regularizer.backward(x, y);
      });
    };
    return ((with(strength) - with(0)) / strength).detach();
  };
  const torch::Tensor exact = penalty_part(microreg::Exact{}, 1, std::nullopt);
  // Over eight samples a difference of batch normalisation is taken by double backward. In float16 seeds of this size
  // would be 0.
  CHECK(relative_error(penalty_part(microreg::ForwardDifference{}, 1e-6, torch::kHalf), exact) < 0.1);
  CHECK(relative_error(penalty_part(microreg::Exact{}, 1e-6, torch::kHalf), exact) < 0.1);
}
