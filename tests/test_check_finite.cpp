// Values that are not finite: the step is refused, or it or its penalty is skipped.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>

#include <cmath>
#include <cstdint>

using namespace helpers;
using microreg::GradientNorm;
using microreg::NonFinite;
using microreg::Regularizer;
using torch::Tensor;

TEST_CASE("what is done about NaN", "[check finite]") {
  if (skipped_off_the_cpu("values are looked at on the CPU unless asked")) {
    return;
  }
  torch::nn::Sequential model(torch::nn::Linear(6, 8), torch::nn::BatchNorm1d(8), torch::nn::Linear(8, 5));
  model->to(torch::kFloat64);
  auto batch = networks::vectors(8);
  const auto last = [](const Tensor& o, const Tensor& y) { return torch::cross_entropy_loss(o, y); };
  SECTION("the step is skipped") {
    batch.input[5].fill_(std::nan(""));
    Regularizer r(model, last, GradientNorm{}, {.micro_batch_size = 4, .non_finite = NonFinite::skip_step});
    const Watch watch(*model);
    const auto report = r.backward(batch.input, batch.target);
    CHECK(report.skipped);
    CHECK(r.skipped() == 1);
    CHECK(r.step() == 1);
    CHECK(watch.unchanged());
    microreg::Penalised p(model, GradientNorm{}, {.non_finite = NonFinite::skip_step});
    CHECK(p.backward([&] { return last(model->forward(batch.input), batch.target); }).skipped);
    CHECK(p.skipped() == 1);
    CHECK(watch.unchanged());
  }
  SECTION("the penalty is skipped") {
    // A probe whose gradient is infinite where the loss's is not.
    const auto steep =
        microreg::SquaredGradientNorm{[](const Tensor& o) { return (o - o.detach()).abs().sum().sqrt(); }};
    const auto gradient = [&](double strength, NonFinite policy) {
      model->zero_grad();
      Regularizer r(model, last, steep, {.strength = strength, .micro_batch_size = 4, .non_finite = policy});
      const auto report = r.backward(batch.input, batch.target);
      CHECK(report.penalty_skipped == (policy == NonFinite::skip_penalty));
      CHECK_FALSE(report.skipped);
      return flat_grad(model->parameters());
    };
    CHECK_THROWS_AS(gradient(1, NonFinite::error), microreg::NonFiniteError);
    model->zero_grad();
    const Tensor found = gradient(1, NonFinite::skip_penalty);
    Tensor expected = torch::zeros({}, torch::kFloat64);
    for (const std::int64_t begin : {0, 4}) {
      expected = expected + last(model->forward(batch.input.narrow(0, begin, 4)), batch.target.narrow(0, begin, 4)) / 2;
    }
    model->zero_grad();
    expected.backward();
    CHECK(relative_error(found, flat_grad(model->parameters())) < 1e-12);
    // A loss that the loop has computed serves again, with a closure or without.
    for (const bool closure : {false, true}) {
      model->zero_grad();
      microreg::Penalised p(model, steep, {.non_finite = NonFinite::skip_penalty});
      for (auto [part, x, y] : microreg::micro_batches(4, batch.input, batch.target)) {
        const auto pass = [&model, &last, in = x, labels = y] {
          const Tensor o = model->forward(in);
          return microreg::PassTensors{last(o, labels), o};
        };
        CHECK((closure ? p.backward(part, pass) : p.backward(part, pass())).penalty_skipped);
      }
      CHECK(relative_error(flat_grad(model->parameters()), found) < 1e-12);
    }
    microreg::Penalised p(model, GradientNorm{}, {.non_finite = NonFinite::skip_penalty});
    CHECK_FALSE(p.backward(last(model->forward(batch.input), batch.target)).penalty_skipped);
  }
}
