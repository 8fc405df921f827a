// The report: what it prints through fmt, and how it finds what is not finite.
#include "helpers.hpp"

#include <microreg/format.hpp>
#include <microreg/microreg.hpp>

using namespace helpers;

namespace {

microreg::Report sample_report() {
  microreg::Report report;
  report.step = 12;
  report.samples = 10;
  report.loss = helpers::tensor(1.5);
  report.micro_batch_losses = helpers::tensor({1.0, 2.0, 1.5});
  report.penalties.push_back({"gradient_norm", 0.01, helpers::tensor(0.25), helpers::tensor({0.5, 0.5, 0.5})});
  report.penalties.push_back({"mine", 2.0, helpers::tensor(4.0), helpers::tensor({2.0, 2.0, 2.0})});
  report.gradient_norm = helpers::tensor(3.0);
  return report;
}

}  // namespace

TEST_CASE("a report prints through fmt", "[report]") {
  microreg::Report report = sample_report();
  CHECK(fmt::format("{}", report) ==
        "step 12: loss 1.5, gradient_norm 0.25 (x 0.01), mine 4 (x 2), |grad| 3, 10 samples in 3 micro-batches");
  report.gradient_norm = torch::Tensor();
  report.penalties.clear();
  report.micro_batch_losses = helpers::tensor({1.5});
  CHECK(fmt::format("{}", report) == "step 12: loss 1.5, 10 samples in 1 micro-batch");
}

TEST_CASE("the objective is the loss and the penalties with their strengths", "[report]") {
  CHECK(sample_report().objective().item<double>() == Approx(1.5 + 0.01 * 0.25 + 2.0 * 4.0));
}

TEST_CASE("the first micro-batch that is not finite is named", "[report]") {
  const auto fails = [](const auto& change) {
    microreg::Report report = sample_report();
    report.throw_if_not_finite();
    change(report);
    std::int64_t index = -1;
    const std::string message = message_of<microreg::NonFiniteError>([&] {
      try {
        report.throw_if_not_finite();
      } catch (const microreg::NonFiniteError& error) {
        index = error.micro_batch();
        throw;
      }
    });
    return std::pair{message, index};
  };
  const auto loss = fails([](auto& r) { r.micro_batch_losses[1] = std::nan(""); });
  CHECK(has(loss.first, {"the loss", "nan", "micro-batch 1 of 3", "step 12", "learning rate"}));
  CHECK(loss.second == 1);
  const auto penalty =
      fails([](auto& r) { r.penalties[1].micro_batch_norms[2] = std::numeric_limits<float>::infinity(); });
  CHECK(has(penalty.first, {"mine", "inf", "micro-batch 2 of 3"}));
  CHECK(penalty.second == 2);
  const auto gradient = fails([](auto& r) { r.gradient_norm.fill_(std::nan("")); });
  CHECK(has(gradient.first, {"gradient of the objective", "nan", "step 12"}));
}
