// Strengths: numbers and schedules, and when a step asks for them.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>

#include <cstdint>
#include <limits>
#include <string>
#include <tuple>

using namespace helpers;

TEST_CASE("linear warm-up", "[strength]") {
  const microreg::LinearWarmUp warm_up{.peak = 0.8, .steps = 4};
  CHECK(warm_up(0) == 0);
  CHECK(warm_up(1) == Approx(0.2));
  CHECK(warm_up(3) == Approx(0.6));
  CHECK(warm_up(4) == 0.8);
  CHECK(warm_up(1000) == 0.8);
  CHECK(microreg::LinearWarmUp{.peak = 0.8, .steps = 0}(0) == 0.8);
  CHECK(microreg::Strength(warm_up).at(2) == Approx(0.4));
  CHECK(microreg::Strength(0.3).at(7) == 0.3);
  CHECK(microreg::Strength(2).at(7) == 2.0);
}

TEST_CASE("a schedule is asked once a step, and a run can resume", "[strength]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(8);
  microreg::Regularizer regularizer(
      model, cross_entropy,
      microreg::LinearWarmUp{.peak = 1, .steps = 10} * microreg::GradientNorm{} + 0.5 * microreg::AverageJacobian{},
      {.strength = [](std::int64_t step) { return step < 2 ? 1.0 : 3.0; }});
  const auto strengths = [&] {
    const auto report = regularizer.backward(batch.input, batch.target);
    return std::tuple{report.step, report.penalties[0].strength, report.penalties[1].strength};
  };
  CHECK(strengths() == std::tuple{0, 0.0, 0.5});
  CHECK(strengths() == std::tuple{1, 0.1, 0.5});
  CHECK(regularizer.step() == 2);
  CHECK(strengths() == std::tuple{2, 3 * 0.2, 1.5});
  regularizer.set_step(20);
  CHECK(strengths() == std::tuple{20, 3.0, 1.5});
  CHECK(regularizer.step() == 21);
}

TEST_CASE("a strength is a finite number, at least 0", "[strength]") {
  constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();
  for (const double strength : {not_a_number, std::numeric_limits<double>::infinity(), -0.5}) {
    const std::string message =
        message_of<microreg::OptionError>([&] { microreg::RegularizerOptions options{.strength = strength}; });
    CHECK(has(message, {"strength", c10::str(strength).c_str(), "finite"}));
    CHECK(has(message_of<microreg::OptionError>([&] { (void)(strength * microreg::GradientNorm{}); }),
              {"strength", "finite"}));
  }
}
