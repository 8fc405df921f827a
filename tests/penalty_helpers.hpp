/// @file
/// What penalties are compared with: a network whose derivatives are written down, and definitions as graphs.
#pragma once

#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace penalty_helpers {

using torch::Tensor;

constexpr double strength = 0.7;

/// tanh(x W) B with a constant B, on micro-batches of 4, 4 and 2 samples, in float64 and without autograd. With
/// t = tanh(x W) and o for products of elements, a probe s = mean over x of sum over h of b_xh t_xh has
///
///     G = grad_W s = x^T (b o (1 - t^2)) / M,   grad_W || G ||^2 = 4 x^T (b o t o (t^2 - 1) o x G) / M.
struct TanhNetwork {
  static constexpr std::int64_t samples = 10, outputs = 2;

  TanhNetwork() {
    torch::manual_seed(41);
    w = torch::randn({4, 3}, torch::kFloat64).requires_grad_(true);
    mix = torch::randn({3, outputs}, torch::kFloat64);
    x = torch::randn({samples, 4}, torch::kFloat64);
    y = torch::randn({samples, outputs}, torch::kFloat64);
  }

  /// G.
  [[nodiscard]] Tensor gradient(const Tensor& rows, const Tensor& b) const {
    const torch::NoGradGuard no_grad;
    return rows.t().matmul(b * (1 - rows.matmul(w).tanh().square())) / rows.size(0);
  }
  /// A penalty of some samples, its gradient, and the norm that is reported.
  struct ByHand {
    Tensor value, slope, norm;
  };
  /// That of the probes with these b, each [M, 3] or [1, 3].
  [[nodiscard]] ByHand squared_norm(const Tensor& rows, const std::vector<Tensor>& probes, double factor = 1) const {
    const torch::NoGradGuard no_grad;
    const Tensor t = rows.matmul(w).tanh();
    ByHand sum{torch::zeros({}, torch::kFloat64), torch::zeros_like(w), {}};
    for (const Tensor& b : probes) {
      const Tensor g = gradient(rows, b);
      sum.value += factor * g.square().sum();
      sum.slope += factor * 4 * rows.t().matmul(b * t * (t * t - 1) * rows.matmul(g)) / rows.size(0);
    }
    sum.norm = sum.value.sqrt();
    return sum;
  }
  /// The b of the loss, and of each output.
  [[nodiscard]] Tensor of_loss(const Tensor& labels) const { return labels.matmul(mix.t()); }
  [[nodiscard]] Tensor of_outputs(const Tensor& u) const { return mix.matmul(u).unsqueeze(0); }

  /// The sum over outputs of output times label, averaged over samples.
  static Tensor loss(const Tensor& output, const Tensor& labels) { return (output * labels).sum(1).mean(); }
  [[nodiscard]] Tensor forward(const Tensor& rows) const { return rows.matmul(w).tanh().matmul(mix); }
  [[nodiscard]] auto model() const {
    return microreg::FunctionModel{[this](const Tensor& rows) { return forward(rows); }, {w}};
  }

  /// A step, and `functor(output, loss)` on each micro-batch, against `by_hand(rows, labels)` of each.
  template <class Penalty, class Functor, class Definition>
  void check(const Penalty& penalty, const Functor& functor, const Definition& by_hand) const {
    w.mutable_grad() = Tensor();
    microreg::Regularizer regularizer(
        model(), loss, penalty, {.strength = strength, .micro_batch_size = 4, .generator = helpers::generator(6)});
    const microreg::Report report = regularizer.backward(x, y);
    Tensor value = torch::zeros({}, torch::kFloat64), grad = torch::zeros_like(w);
    std::vector<Tensor> norms;
    for (std::int64_t begin = 0; begin < samples; begin += 4) {
      const std::int64_t size = std::min<std::int64_t>(4, samples - begin);
      const Tensor rows = x.narrow(0, begin, size), labels = y.narrow(0, begin, size);
      const ByHand expected = by_hand(rows, labels);
      const Tensor output = forward(rows);
      const Tensor found = functor(output, loss(output, labels));
      CHECK(helpers::relative_error(found, expected.value) < 1e-12);
      CHECK(helpers::relative_error(torch::autograd::grad({found}, {w})[0], expected.slope) < 1e-12);
      const double weight = static_cast<double>(size) / samples;
      value += weight * expected.value;
      grad += weight * (gradient(rows, of_loss(labels)) + strength * expected.slope);
      norms.push_back(expected.norm);
    }
    CHECK(helpers::relative_error(report.penalties[0].value, value) < 1e-12);
    CHECK(helpers::relative_error(report.penalties[0].micro_batch_norms, torch::stack(norms)) < 1e-12);
    CHECK(helpers::relative_error(w.grad(), grad) < 1e-12);
    CHECK(report.penalties[0].name == penalty.name());
  }

  Tensor w, mix, x, y;
};

/// An MLP on three samples, which are one micro-batch.
struct Scene {
  networks::Mlp model = networks::seeded_mlp();
  networks::Samples batch = networks::vectors(3);

  [[nodiscard]] Tensor output() { return model->forward(batch.input); }

  /// One step on the whole batch and the functor, against an expected value with a graph.
  template <class Penalty, class Functor>
  void check(const Penalty& penalty, const Tensor& expected, const Functor& functor) {
    const auto parameters = model->parameters();
    helpers::clear_grad(parameters);
    microreg::Regularizer regularizer(
        model, helpers::cross_entropy, penalty,
        {.strength = strength, .micro_batch_size = 128, .generator = helpers::generator(6)});
    const auto report = regularizer.backward(batch.input, batch.target);
    const Tensor gradient = helpers::flat_grad(parameters);
    CHECK(helpers::relative_error(report.penalties[0].value, expected) < 1e-12);
    CHECK(helpers::relative_error(report.penalties[0].micro_batch_norms.square(), expected.unsqueeze(0)) < 1e-12);

    const Tensor value = functor(output(), parameters);
    CHECK(helpers::relative_error(value, expected) < 1e-12);
    for (const Tensor& scalar : {expected, value}) {
      helpers::clear_grad(parameters);
      (torch::cross_entropy_loss(output(), batch.target) + strength * scalar).backward();
      CHECK(helpers::relative_error(gradient, helpers::flat_grad(parameters)) < 1e-12);
    }
  }
};

/// That a penalty of the output says what is no output to differentiate.
template <class Penalty>
void check_refusals(const Penalty& penalty) {
  const std::string name(penalty.name());
  const Tensor output = torch::ones({4, 5}).requires_grad_(true);
  const auto message = [&](const Tensor& other) {
    return helpers::message_of<microreg::ModelError>([&] { (void)penalty(other, {output}); });
  };
  CHECK(helpers::has(message(output.argmax(1)), {name.c_str(), "floating-point", "Long"}));
  CHECK(helpers::has(message(output.sum()), {name.c_str(), "[M, ...]", "[]"}));
  CHECK(helpers::has(message(output.narrow(0, 0, 0)), {name.c_str(), "at least one sample", "[0, 5]"}));
  CHECK(helpers::has(message(Tensor()), {name.c_str(), "undefined"}));
}

/// Outputs [4, 3, 3, 3] of a convolution.
struct Maps {
  Maps() {
    torch::manual_seed(81);
    conv = torch::nn::Conv2d(2, 3, 3);
    conv->to(torch::kFloat64);
    output = torch::tanh(conv(torch::randn({4, 2, 5, 5}, torch::kFloat64)));
  }
  torch::nn::Conv2d conv{nullptr};
  Tensor output;
};

/// The next `count` unit vectors that UnitJacobian draws from a generator, made here once more.
inline std::vector<Tensor> directions(std::int64_t count, std::int64_t outputs, const at::Generator& from) {
  std::vector<Tensor> result;
  for (std::int64_t k = 0; k < count; ++k) {
    const Tensor normal = torch::empty({outputs}, torch::kFloat64).normal_(0, 1, from);
    result.push_back(normal / normal.square().sum().sqrt());
  }
  return result;
}

/// mean over samples of ||df/dx||_F^2 as a graph, sample by sample and row by row.
template <class Model>
Tensor input_jacobian_by_definition(Model& model, const Tensor& input) {
  Tensor sum = torch::zeros({}, torch::kFloat64);
  for (std::int64_t i = 0; i < input.size(0); ++i) {
    const Tensor x = input.narrow(0, i, 1).clone().requires_grad_(true);
    const Tensor output = model->forward(x)[0];
    for (std::int64_t c = 0; c < output.size(0); ++c) {
      sum = sum + torch::autograd::grad({output[c]}, {x}, {}, true, true)[0].square().sum();
    }
  }
  return sum / input.size(0);
}

}  // namespace penalty_helpers
