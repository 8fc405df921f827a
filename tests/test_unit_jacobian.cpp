// UnitJacobian: random unit combinations of the rows of the mean output's Jacobian.
#include "penalty_helpers.hpp"

#include <cmath>

using namespace helpers;
using namespace penalty_helpers;

TEST_CASE("the unit Jacobian by hand, of directions that are drawn anew for each micro-batch", "[unit_jacobian]") {
  const TanhNetwork network;
  const bool scaled = GENERATE(false, true);
  const std::int64_t count = GENERATE(1, 3);
  const microreg::UnitJacobian penalty{.directions = count, .scale_by_outputs = scaled};
  CHECK(penalty.name() == "unit_jacobian");
  const at::Generator drawn = generator(6), drawn_by_hand = generator(6);
  network.check(
      penalty, [&](const Tensor& output, const Tensor&) { return penalty(output, {network.w}, drawn); },
      [&](const Tensor& rows, const Tensor&) {
        std::vector<Tensor> probes;
        for (const Tensor& u : directions(count, TanhNetwork::outputs, drawn_by_hand)) {
          probes.push_back(network.of_outputs(u));
        }
        return network.squared_norm(rows, probes, (scaled ? 2.0 : 1.0) / static_cast<double>(count));
      });
}

TEST_CASE("several directions are averaged", "[unit_jacobian]") {
  Scene scene;
  const bool scaled = GENERATE(false, true);
  const std::int64_t count = GENERATE(1, 3);
  const torch::Tensor mean = scene.output().mean(0);
  torch::Tensor expected = torch::zeros({}, torch::kFloat64);
  for (const torch::Tensor& u : directions(count, networks::classes, generator(6))) {
    expected = expected + squared_norm_by_hand((u * mean).sum(), scene.model->parameters());
  }
  expected = expected * (scaled ? 5.0 : 1.0) / static_cast<double>(count);
  const microreg::UnitJacobian penalty{.directions = count, .scale_by_outputs = scaled};
  scene.check(penalty, expected, [&](const torch::Tensor& output, const std::vector<torch::Tensor>& parameters) {
    return penalty(output, parameters, generator(6));
  });
}

TEST_CASE("scaled directions average to the Jacobian norm", "[unit_jacobian]") {
  Scene scene;
  const auto parameters = scene.model->parameters();
  const double exact = microreg::JacobianNorm{}(scene.output(), parameters).item<double>();
  at::Generator draws = generator(12);
  const microreg::UnitJacobian penalty{.directions = 20, .scale_by_outputs = true};
  const auto [mean, error] =
      monte_carlo(200, [&] { return penalty(scene.output(), parameters, draws).item<double>(); });
  CHECK(error < 0.02 * exact);
  CHECK(std::abs(mean - exact) < 4.5 * error);
}

TEST_CASE("the unit Jacobian of outputs of more dimensions", "[unit_jacobian]") {
  const Maps maps;
  const torch::Tensor& output = maps.output;
  const auto parameters = maps.conv->parameters();
  CHECK(relative_error(microreg::UnitJacobian{}(output, parameters, generator(3)),
                       microreg::UnitJacobian{}(output.flatten(1), parameters, generator(3))) < 1e-13);
  CHECK(microreg::UnitJacobian{}(output.select(1, 0).mean({1, 2}), parameters).item<double>() > 0);
  // f_ij(x) = w_ij: u^T J-bar is u, of norm 1, and there are six outputs.
  const Tensor w = torch::ones({2, 3}, torch::kFloat64).requires_grad_(true);
  CHECK(microreg::UnitJacobian{.scale_by_outputs = true}(w.expand({4, 2, 3}), {w}).item<double>() == Approx(6));
}

TEST_CASE("the unit Jacobian names what it cannot use", "[unit_jacobian]") {
  check_refusals(microreg::UnitJacobian{});
  const Tensor output = torch::ones({4, 5}).requires_grad_(true);
  CHECK(
      has(message_of<microreg::OptionError>([&] { (void)microreg::UnitJacobian{.directions = -2}(output, {output}); }),
          {"UnitJacobian.directions", "-2", "at least 1"}));
}
