// measure: the values that Regularizer reports, without a trace left behind.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>

using namespace helpers;

TEST_CASE("measure reports what Regularizer reports and disturbs nothing", "[measure]") {
  auto model = networks::seeded_cnn(networks::Norm::batch, networks::Activation::kinked);
  const auto batch = networks::images(10);
  const auto penalties = 0.1 * microreg::GradientNorm{} + 0.2 * microreg::FisherTrace{} +
                         0.3 * microreg::AverageJacobian{} + 0.4 * microreg::UnitJacobian{};
  const auto weighting = GENERATE(microreg::Weighting::samples, microreg::Weighting::reference);
  const bool own_generator = GENERATE(false, true);
  const bool training = GENERATE(true, false);
  model->train(training);
  const auto options = [&]<class Options>(Options chosen) {
    chosen.strength = 0.5;
    chosen.micro_batch_size = 4;
    chosen.weighting = weighting;
    chosen.generator = own_generator ? std::optional(generator(3)) : std::nullopt;
    return chosen;
  };
  model->conv1->weight.mutable_grad() = torch::ones_like(model->conv1->weight);
  const Watch watch(*model);
  const auto measured = microreg::measure(model, cross_entropy, penalties, batch.input, batch.target,
                                          options(microreg::MeasureOptions{}));
  CHECK(watch.unchanged());
  microreg::Regularizer regularizer(model, cross_entropy, penalties, options(microreg::RegularizerOptions{}));
  const auto report = regularizer.backward(batch.input, batch.target);

  CHECK(relative_error(measured.loss, report.loss) < 1e-14);
  CHECK(relative_error(measured.micro_batch_losses, report.micro_batch_losses) < 1e-14);
  CHECK(measured.samples == 10);
  CHECK(measured.micro_batches() == 3);
  CHECK_FALSE(measured.gradient_norm.defined());
  REQUIRE(measured.penalties.size() == 4);
  for (std::size_t i = 0; i < 4; ++i) {
    CHECK(measured.penalties[i].name == report.penalties[i].name);
    CHECK(measured.penalties[i].strength == report.penalties[i].strength);
    CHECK(relative_error(measured.penalties[i].value, report.penalties[i].value) < 1e-13);
    CHECK(relative_error(measured.penalties[i].micro_batch_norms, report.penalties[i].micro_batch_norms) < 1e-13);
    CHECK_FALSE(measured.penalties[i].value.requires_grad());
  }
  CHECK(relative_error(measured.objective(), report.objective()) < 1e-13);
}

TEST_CASE("measure throws as a step does, and disturbs nothing then either", "[measure]") {
  auto model = networks::seeded_cnn(networks::Norm::batch, networks::Activation::kinked);
  const auto batch = networks::images(10);
  const Watch watch(*model);
  int calls = 0;
  const auto loss = [&](const torch::Tensor& output, const torch::Tensor& y) {
    return ++calls == 2 ? throw std::domain_error("second micro-batch") : torch::cross_entropy_loss(output, y);
  };
  message_of<std::domain_error>([&] {
    (void)microreg::measure(model, loss, microreg::FisherTrace{}, batch.input, batch.target, {.micro_batch_size = 4});
  });
  CHECK(watch.unchanged());
  CHECK(has(message_of<microreg::OptionError>([&] {
              (void)microreg::measure(model, loss, microreg::FisherTrace{}, batch.input, batch.target,
                                      {.micro_batch_size = 0});
            }),
            {"micro_batch_size", "0"}));
  CHECK(has(message_of<microreg::BatchError>([&] {
              (void)microreg::measure(model, loss, microreg::FisherTrace{}, batch.input, batch.target.narrow(0, 0, 3));
            }),
            {"10", "3"}));
  CHECK(watch.unchanged());
}

TEST_CASE("measure reports what is not finite instead of throwing", "[measure]") {
  auto model = networks::seeded_mlp();
  auto batch = networks::vectors(8);
  batch.input[5] = std::numeric_limits<double>::quiet_NaN();
  const auto report = microreg::measure(model, cross_entropy, microreg::GradientNorm{}, batch.input, batch.target,
                                        {.micro_batch_size = 4});
  CHECK(std::isnan(report.loss.item<double>()));
  CHECK(std::isfinite(report.micro_batch_losses[0].item<double>()));
  try {
    report.throw_if_not_finite();
    FAIL("no error was thrown");
  } catch (const microreg::NonFiniteError& error) {
    CHECK(error.micro_batch() == 1);
  }
}

TEST_CASE("the meta device, which has no generator and no values, is a device like another", "[measure]") {
  const auto meta = torch::TensorOptions().device(torch::kMeta);
  const auto weight = torch::empty({2, 3}, meta.requires_grad(true));
  const microreg::FunctionModel model{[&](const torch::Tensor& x) { return torch::matmul(x, weight.t()); }, {weight}};
  const auto report = microreg::measure(model, cross_entropy, microreg::GradientNorm{}, torch::empty({8, 3}, meta),
                                        torch::empty({8}, meta.dtype(torch::kInt64)), {.micro_batch_size = 4});
  CHECK(report.penalties.front().value.is_meta());
  CHECK(report.penalties.front().micro_batch_norms.sizes() == torch::IntArrayRef{2});
}
