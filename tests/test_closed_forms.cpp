// Linear and softmax regression, and a linear network of two layers: values and gradients derived by hand, in plain
// tensor algebra without autograd. Throughout, A is the input with a column of ones, T = [W, b] the joint parameter
// matrix [C, D + 1], a-bar the mean row of A.
#include "helpers.hpp"

#include <microreg/microreg.hpp>

using namespace helpers;

namespace {

constexpr std::int64_t samples = 7, features = 4, outputs = 3;
constexpr double strength = 0.7;

struct Regression {
  Regression() {
    torch::manual_seed(17);
    model->to(torch::kFloat64);
    x = torch::randn({samples, features}, torch::kFloat64);
    const torch::NoGradGuard no_grad;
    design = torch::cat({x, torch::ones({samples, 1}, torch::kFloat64)}, 1);
    joint = torch::cat({model->weight, model->bias.unsqueeze(1)}, 1).detach().clone();
    prediction = design.matmul(joint.t());
  }

  /// Runs one step of the whole batch and compares the penalty's value and the whole of `.grad`. `loss_gradient` and
  /// `penalty_gradient` are matrices like T.
  template <class Loss, class Penalty>
  void check(const Loss& loss, const torch::Tensor& y, const Penalty& penalty, const torch::Tensor& loss_gradient,
             const torch::Tensor& value, const torch::Tensor& penalty_gradient,
             std::optional<at::Generator> draws_from = std::nullopt) {
    clear_grad(model->parameters());
    microreg::Regularizer regularizer(
        model, loss, penalty, {.strength = strength, .micro_batch_size = samples, .generator = std::move(draws_from)});
    const microreg::Report report = regularizer.backward(x, y);
    CHECK(relative_error(report.penalties[0].value, value) < 1e-12);
    const torch::Tensor grad = torch::cat({model->weight.grad(), model->bias.grad().unsqueeze(1)}, 1);
    CHECK(relative_error(grad, loss_gradient + strength * penalty_gradient) < 1e-12);
  }

  torch::nn::Linear model{features, outputs};
  torch::Tensor x, design, joint, prediction;
};

torch::Tensor squared(const torch::Tensor& matrix) { return matrix.square().sum(); }

/// The draws of UnitJacobian, made here once more.
torch::Tensor unit_direction(std::uint64_t seed) {
  const torch::Tensor normal = torch::empty({outputs}, torch::kFloat64).normal_(0, 1, generator(seed));
  return normal / normal.square().sum().sqrt();
}

}  // namespace

TEST_CASE("linear regression by hand", "[closed_form]") {
  Regression r;
  const torch::nn::MSELoss mse;
  const torch::Tensor y = torch::randn({samples, outputs}, torch::kFloat64);
  // L = sum of squares of the residual over M * C, so grad L = k residual^T A with k = 2 / (M C).
  const double k = 2.0 / (samples * outputs);
  const torch::Tensor moment = r.design.t().matmul(r.design);
  const torch::Tensor loss_gradient = k * (r.prediction - y).t().matmul(r.design);
  const torch::Tensor zero = torch::zeros_like(r.joint);
  const torch::Tensor mean_row = r.design.mean(0);

  SECTION("gradient norm") {
    // d||G||^2 = 2 <G, k dT A^T A>.
    r.check(mse, y, microreg::GradientNorm{}, loss_gradient, squared(loss_gradient),
            2 * k * loss_gradient.matmul(moment));
  }
  SECTION("Fisher trace of a Gaussian, given labels") {
    const double deviation = 0.6;
    const torch::Tensor drawn = r.prediction + 0.6 * torch::randn({samples, outputs}, torch::kFloat64);
    const double scale = 1.0 / (samples * deviation * deviation);
    const torch::Tensor g = scale * (r.prediction - drawn).t().matmul(r.design);
    const microreg::Gaussian gaussian{deviation};
    const microreg::Distribution given{[&](const torch::Tensor&, const auto&) { return drawn; },
                                       [&](const torch::Tensor& mean, const torch::Tensor& labels) {
                                         return gaussian.negative_log_likelihood(mean, labels);
                                       }};
    r.check(mse, y, microreg::FisherTrace{given}, loss_gradient, squared(g), 2 * scale * g.matmul(moment));
  }
  SECTION("average Jacobian: linear in the parameters, so its gradient vanishes") {
    r.check(mse, y, microreg::AverageJacobian{}, loss_gradient, outputs * squared(mean_row), zero);
  }
  SECTION("unit Jacobian: ||u|| = 1 leaves || a-bar ||^2, whatever the direction") {
    r.check(mse, y, microreg::UnitJacobian{}, loss_gradient, squared(mean_row), zero);
  }
}

TEST_CASE("softmax regression by hand", "[closed_form]") {
  Regression r;
  const torch::Tensor y = torch::randint(outputs, {samples});
  const torch::Tensor e = r.prediction.exp();
  const torch::Tensor p = e / e.sum(1, true);
  const auto gradient = [&](const torch::Tensor& labels) {
    return (p - torch::one_hot(labels, outputs)).t().matmul(r.design) / static_cast<double>(samples);
  };
  // d||G||^2 = 2 <G, dP^T A> / M with dP = p o h - p (p . h), h = dT a; the Jacobian of softmax is symmetric.
  const auto penalty_gradient = [&](const torch::Tensor& g) {
    const torch::Tensor h = r.design.matmul(g.t());
    const torch::Tensor v = p * h - p * (p * h).sum(1, true);
    return 2.0 / samples * v.t().matmul(r.design);
  };
  const torch::Tensor loss_gradient = gradient(y);

  SECTION("gradient norm") {
    r.check(cross_entropy, y, microreg::GradientNorm{}, loss_gradient, squared(loss_gradient),
            penalty_gradient(loss_gradient));
  }
  SECTION("Fisher trace, given labels") {
    const torch::Tensor drawn = torch::randint(outputs, {samples});
    const microreg::Distribution given{[&](const torch::Tensor&, const auto&) { return drawn; },
                                       [](const torch::Tensor& logits, const torch::Tensor& labels) {
                                         return microreg::Categorical{}.negative_log_likelihood(logits, labels);
                                       }};
    const torch::Tensor g = gradient(drawn);
    r.check(cross_entropy, y, microreg::FisherTrace{given}, loss_gradient, squared(g), penalty_gradient(g));
  }
  SECTION("Fisher trace, the labels that the generator gives") {
    const torch::Tensor drawn = microreg::Categorical{}.sample(r.prediction, generator(5));
    const torch::Tensor g = gradient(drawn);
    r.check(cross_entropy, y, microreg::FisherTrace{}, loss_gradient, squared(g), penalty_gradient(g), generator(5));
  }
  SECTION("both Jacobians of the logits") {
    const torch::Tensor mean_row = r.design.mean(0);
    const torch::Tensor zero = torch::zeros_like(r.joint);
    r.check(cross_entropy, y, microreg::AverageJacobian{}, loss_gradient, outputs * squared(mean_row), zero);
    r.check(cross_entropy, y, microreg::UnitJacobian{}, loss_gradient, squared(mean_row), zero);
  }
}

TEST_CASE("Jacobians of a two-layer linear network by hand", "[closed_form]") {
  // f = W2 W1 x. The mean output's Jacobian along v is { v (W1 x-bar)^T, W2^T v x-bar^T }, so
  // R = ||v||^2 ||W1 x-bar||^2 + ||W2^T v||^2 ||x-bar||^2, v = 1 for AJ and a unit vector for UJ.
  torch::manual_seed(23);
  const torch::Tensor x = torch::randn({samples, features}, torch::kFloat64);
  const torch::Tensor w1 = torch::randn({5, features}, torch::kFloat64).requires_grad_(true);
  const torch::Tensor w2 = torch::randn({outputs, 5}, torch::kFloat64).requires_grad_(true);
  const microreg::FunctionModel model{[&](const torch::Tensor& in) { return in.matmul(w1.t()).matmul(w2.t()); },
                                      {w1, w2}};
  // A loss of gradient zero leaves the penalty's own gradient.
  const auto no_loss = [](const torch::Tensor& output, const torch::Tensor&) { return (output * 0).sum(); };
  const auto check = [&](const auto& penalty, const torch::Tensor& v) {
    clear_grad({w1, w2});
    microreg::Regularizer regularizer(model, no_loss, penalty,
                                      {.strength = strength, .micro_batch_size = samples, .generator = generator(9)});
    const microreg::Report report = regularizer.backward(x, x);
    const torch::NoGradGuard no_grad;
    const torch::Tensor mean = x.mean(0);
    const torch::Tensor hidden = w1.matmul(mean);
    const torch::Tensor back = w2.t().matmul(v);
    const torch::Tensor value = squared(v) * squared(hidden) + squared(back) * squared(mean);
    CHECK(relative_error(report.penalties[0].value, value) < 1e-12);
    CHECK(relative_error(w1.grad(), strength * 2 * squared(v) * torch::outer(hidden, mean)) < 1e-12);
    CHECK(relative_error(w2.grad(), strength * 2 * squared(mean) * torch::outer(v, back)) < 1e-12);
  };
  check(microreg::AverageJacobian{}, torch::ones({outputs}, torch::kFloat64));
  check(microreg::UnitJacobian{}, unit_direction(9));
}
