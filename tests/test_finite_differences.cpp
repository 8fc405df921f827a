// The gradient in `.grad` against central differences of the objective, on smooth networks in float64.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>

using namespace helpers;

namespace {

constexpr double distance = 1e-5;

/// The same for the step and for measure().
template <class Options>
Options options() {
  return {.strength = 0.5, .micro_batch_size = 4, .generator = generator(7)};
}

/// Directional derivatives of the objective along random unit directions. Labels and directions are drawn from a fresh
/// generator of the same seed each time, so that the objective is one function of the parameters.
template <class Model, class Penalty>
void check(Model model, const networks::Samples& batch, const Penalty& penalty) {
  const auto parameters = model->parameters();
  clear_grad(parameters);
  microreg::Regularizer regularizer(model, cross_entropy, penalty, options<microreg::RegularizerOptions>());
  (void)regularizer.backward(batch.input, batch.target);
  const torch::Tensor gradient = flat_grad(parameters).to(test_device());

  const torch::NoGradGuard no_grad;
  const std::vector<torch::Tensor> start = clones(parameters);
  const auto objective_at = [&](const torch::Tensor& offset) {
    std::int64_t position = 0;
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      const torch::Tensor part = offset.narrow(0, position, parameters[i].numel());
      parameters[i].copy_(start[i] + part.view_as(parameters[i]));
      position += parameters[i].numel();
    }
    return microreg::measure(model, cross_entropy, penalty, batch.input, batch.target,
                             options<microreg::MeasureOptions>())
        .objective()
        .template item<double>();
  };
  for (int repeat = 0; repeat < 5; ++repeat) {
    torch::Tensor direction = torch::randn_like(gradient);
    // Half of the directions lean on the gradient, so that the derivative is not lost in cancellation.
    direction = direction / direction.norm() + gradient / gradient.norm();
    direction = direction / direction.norm();
    const double difference =
        (objective_at(distance * direction) - objective_at(-distance * direction)) / (2 * distance);
    CHECK(gradient.dot(direction).template item<double>() == Approx(difference).epsilon(2e-7));
  }
}

template <class Penalty>
void check_networks(const Penalty& penalty) {
  SECTION("MLP") { check(networks::seeded_mlp(), networks::vectors(10), penalty); }
  SECTION("CNN") {
    check(networks::seeded_cnn(networks::Norm::none, networks::Activation::smooth), networks::images(10), penalty);
  }
  SECTION("CNN with BatchNorm") {
    check(networks::seeded_cnn(networks::Norm::batch, networks::Activation::smooth), networks::images(10), penalty);
  }
  SECTION("CNN with BatchNorm in evaluation mode") {
    networks::Cnn model = networks::seeded_cnn(networks::Norm::batch, networks::Activation::smooth);
    model->forward(networks::images(10).input);
    model->eval();
    check(model, networks::images(10), penalty);
  }
}

}  // namespace

TEST_CASE("gradient norm against finite differences", "[finite_difference]") {
  check_networks(microreg::GradientNorm{});
}
TEST_CASE("Fisher trace against finite differences", "[finite_difference]") { check_networks(microreg::FisherTrace{}); }
TEST_CASE("average Jacobian against finite differences", "[finite_difference]") {
  check_networks(microreg::AverageJacobian{});
}
TEST_CASE("unit Jacobian against finite differences", "[finite_difference]") {
  check_networks(microreg::UnitJacobian{});
}
TEST_CASE("a sum of penalties against finite differences", "[finite_difference]") {
  check_networks(0.3 * microreg::GradientNorm{} + 2.0 * microreg::FisherTrace{} + 0.1 * microreg::AverageJacobian{} +
                 0.7 * microreg::UnitJacobian{});
}
