// AverageJacobian: the sum of the rows of the mean output's Jacobian.
#include "penalty_helpers.hpp"

using namespace helpers;
using namespace penalty_helpers;

TEST_CASE("the average Jacobian by hand", "[average_jacobian]") {
  const TanhNetwork network;
  const microreg::AverageJacobian penalty;
  CHECK(penalty.name() == "average_jacobian");
  network.check(
      penalty, [&](const Tensor& output, const Tensor&) { return penalty(output, {network.w}); },
      [&](const Tensor& rows, const Tensor&) {
        return network.squared_norm(rows, {network.of_outputs(torch::ones({TanhNetwork::outputs}, torch::kFloat64))});
      });
}

TEST_CASE("the average Jacobian of outputs of more dimensions", "[average_jacobian]") {
  const Maps maps;
  const torch::Tensor& output = maps.output;
  const auto parameters = maps.conv->parameters();
  CHECK(relative_error(microreg::AverageJacobian{}(output, parameters),
                       microreg::AverageJacobian{}(output.flatten(1), parameters)) < 1e-13);
  // f_ij(x) = w_ij x_i: where the mean of x is (1, -2), each of three j adds 1^2 + 2^2.
  const Tensor w = torch::ones({2, 3}, torch::kFloat64).requires_grad_(true);
  const Tensor x = helpers::tensor({{0.5, -3.0}, {1.5, -1.0}}, torch::kFloat64);
  CHECK(microreg::AverageJacobian{}(x.unsqueeze(2) * w, {w}).item<double>() == Approx(15));
}

TEST_CASE("the average Jacobian names what it cannot use", "[average_jacobian]") {
  check_refusals(microreg::AverageJacobian{});
}
