// JacobianNorm: all rows of the mean output's Jacobian.
#include "penalty_helpers.hpp"

using namespace helpers;
using namespace penalty_helpers;

TEST_CASE("the Jacobian norm is the sum over rows of J-bar", "[jacobian_norm]") {
  Scene scene;
  torch::Tensor expected = torch::zeros({}, torch::kFloat64);
  const torch::Tensor mean = scene.output().mean(0);
  for (std::int64_t c = 0; c < networks::classes; ++c) {
    expected = expected + squared_norm_by_hand(mean[c], scene.model->parameters());
  }
  scene.check(microreg::JacobianNorm{}, expected, microreg::JacobianNorm{});
}

TEST_CASE("the Jacobian norm by hand", "[jacobian_norm]") {
  const TanhNetwork network;
  const microreg::JacobianNorm penalty;
  CHECK(penalty.name() == "jacobian_norm");
  network.check(
      penalty, [&](const Tensor& output, const Tensor&) { return penalty(output, {network.w}); },
      [&](const Tensor& rows, const Tensor&) {
        std::vector<Tensor> probes;
        for (const Tensor& one : torch::eye(TanhNetwork::outputs, torch::kFloat64).unbind()) {
          probes.push_back(network.of_outputs(one));
        }
        return network.squared_norm(rows, probes);
      });
}

TEST_CASE("the Jacobian norm of outputs of more dimensions has a row for each value", "[jacobian_norm]") {
  // f_ij(x) = (w_i + w_j) x_j: row (i, j) is mean(x_j) (e_i + e_j), of squared norm 2, or 4 where i = j.
  const Tensor w = torch::ones({2}, torch::kFloat64).requires_grad_(true);
  const Tensor x = helpers::tensor({{0.5, -3.0}, {1.5, -1.0}}, torch::kFloat64);  // of mean (1, -2)
  const Tensor output = (w.unsqueeze(1) + w) * x.unsqueeze(1);
  CHECK(microreg::JacobianNorm{}(output, {w}).item<double>() == Approx((4 + 2) * 1 + (2 + 4) * 4));
}

TEST_CASE("the Jacobian norm names what it cannot use", "[jacobian_norm]") { check_refusals(microreg::JacobianNorm{}); }
