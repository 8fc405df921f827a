// GradientNorm: the loss gradient's squared norm.
#include "penalty_helpers.hpp"

using namespace helpers;
using namespace penalty_helpers;

TEST_CASE("the gradient norm by hand", "[gradient_norm]") {
  const TanhNetwork network;
  const microreg::GradientNorm penalty;
  CHECK(penalty.name() == "gradient_norm");
  network.check(
      penalty, [&](const Tensor&, const Tensor& loss) { return penalty(loss, {network.w}); },
      [&](const Tensor& rows, const Tensor& labels) { return network.squared_norm(rows, {network.of_loss(labels)}); });
}

TEST_CASE("the gradient norm is over all parameters that are given, jointly", "[gradient_norm]") {
  // L = 3 a^2 + a b^3 has the gradient (6 a + b^3, 3 a b^2), which is (20, 24) at a = 2, b = 2.
  const Tensor a = helpers::tensor(2.0, torch::kFloat64).requires_grad_(true);
  const Tensor b = helpers::tensor(2.0, torch::kFloat64).requires_grad_(true);
  const auto penalty = [&](const std::vector<Tensor>& parameters) {
    return microreg::GradientNorm{}(3 * a * a + a * b.pow(3), parameters);
  };
  CHECK(penalty({a}).item<double>() == Approx(400));
  CHECK(penalty({b}).item<double>() == Approx(576));
  const Tensor both = penalty({a, b});
  CHECK(both.item<double>() == Approx(976));
  // Its own: 2 * 20 * (6, 3 b^2) + 2 * 24 * (3 b^2, 6 a b).
  const auto gradient = torch::autograd::grad({both}, {a, b});
  CHECK(gradient[0].item<double>() == Approx(40 * 6 + 48 * 12));
  CHECK(gradient[1].item<double>() == Approx(40 * 12 + 48 * 24));
}
