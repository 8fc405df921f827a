// Penalties of one's own: probes as lambdas of each form, several probes, and names.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>

using namespace helpers;

namespace {

/// A penalty class of a user's: two probes, whose squared norms are added up.
struct TwoProbes {
  [[nodiscard]] std::string name() const { return "two"; }
  template <class Pass>
  [[nodiscard]] std::vector<torch::Tensor> probes(const Pass& pass) const {
    return {pass.loss, pass.output.mean()};
  }
};

template <class Penalty>
torch::Tensor gradient(const networks::Mlp& model, const networks::Samples& batch, const Penalty& penalty,
                       double strength = 1.0) {
  clear_grad(model->parameters());
  microreg::Regularizer regularizer(model, cross_entropy, penalty, {.strength = strength, .micro_batch_size = 4});
  (void)regularizer.backward(batch.input, batch.target);
  return flat_grad(model->parameters());
}

}  // namespace

static_assert(microreg::Penalty<microreg::GradientNorm>);
static_assert(microreg::Penalty<TwoProbes>);
static_assert(!microreg::Penalty<int>);
static_assert(!microreg::PenaltyExpression<double>);

TEST_CASE("a probe takes the pass, the output, or the output and the target", "[penalty]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(10);
  const torch::Tensor norm = gradient(model, batch, microreg::GradientNorm{});
  const torch::Tensor jacobian = gradient(model, batch, microreg::AverageJacobian{});

  const microreg::SquaredGradientNorm of_pass{[](const auto& pass) {
    // What a pass offers beside the output.
    CHECK(pass.input.size(0) == pass.output.size(0));
    CHECK_FALSE(pass.generator.has_value());
    return torch::cross_entropy_loss(pass.output, pass.target);
  }};
  const microreg::SquaredGradientNorm of_loss{[](const auto& pass) { return pass.loss; }};
  const microreg::SquaredGradientNorm of_output{[](const torch::Tensor& output) { return output.mean(0).sum(); }};
  const microreg::SquaredGradientNorm of_both{
      [](const torch::Tensor& output, const torch::Tensor& y) { return torch::cross_entropy_loss(output, y); }};
  CHECK(relative_error(gradient(model, batch, of_pass), norm) < 1e-13);
  CHECK(relative_error(gradient(model, batch, of_loss), norm) < 1e-13);
  CHECK(relative_error(gradient(model, batch, of_both), norm) < 1e-13);
  CHECK(relative_error(gradient(model, batch, of_output), jacobian) < 1e-13);
}

TEST_CASE("several probes of one penalty are added up", "[penalty]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(10);
  const microreg::SquaredGradientNorm mean{[](const torch::Tensor& output) { return output.mean(); }};
  CHECK(relative_error(gradient(model, batch, TwoProbes{}), gradient(model, batch, microreg::GradientNorm{} + mean)) <
        1e-13);
  const auto value = [&](const auto& penalty) {
    const auto report =
        microreg::measure(model, cross_entropy, penalty, batch.input, batch.target, {.micro_batch_size = 4});
    torch::Tensor sum = report.penalties[0].value;
    for (std::size_t i = 1; i < report.penalties.size(); ++i) {
      sum = sum + report.penalties[i].value;
    }
    return sum;
  };
  CHECK(relative_error(value(TwoProbes{}), value(microreg::GradientNorm{} + mean)) < 1e-13);
}

TEST_CASE("one penalty's strength and the common strength multiply", "[penalty]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(10);
  const torch::Tensor exact = gradient(model, batch, microreg::GradientNorm{}, 0.06);
  CHECK(relative_error(gradient(model, batch, 0.06 * microreg::GradientNorm{}), exact) < 1e-13);
  CHECK(relative_error(gradient(model, batch, 0.3 * microreg::GradientNorm{}, 0.2), exact) < 1e-13);
}

TEST_CASE("the functor of a probe of one's own", "[penalty]") {
  auto model = networks::seeded_mlp();
  const torch::Tensor output = model->forward(networks::vectors(4).input);
  const microreg::SquaredGradientNorm mine{[](const torch::Tensor& o) { return o.mean(0).sum(); }, "mine"};
  CHECK(relative_error(mine(output, model->parameters()), microreg::AverageJacobian{}(output, model->parameters())) <
        1e-14);
  CHECK(mine.name() == "mine");
  const auto report = microreg::measure(model, cross_entropy, mine, torch::ones({4, 6}, torch::kFloat64),
                                        torch::zeros({4}, torch::kInt64));
  CHECK(report.penalty("mine").value.defined());
  CHECK(has(message_of<microreg::OptionError>([&] { (void)report.penalty("yours"); }), {"yours", "mine"}));
}
