// Penalised: the same gradient as Regularizer in a loop of one's own, in every form of backward().
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>

#include <limits>
#include <tuple>
#include <utility>

using namespace helpers;
using microreg::ModelError;
using microreg::OptionError;
using microreg::Penalised;

namespace {

constexpr std::int64_t micro_batch = 4;

struct Scene {
  networks::Cnn model = networks::seeded_cnn(networks::Norm::batch, networks::Activation::kinked);
  networks::Samples batch = networks::images(10);

  [[nodiscard]] torch::Tensor gradient() const { return flat_grad(model->parameters()); }

  /// What Regularizer puts into `.grad`; random numbers from a generator of its own.
  template <class Penalty>
  torch::Tensor expected(const Penalty& penalty, microreg::RegularizerOptions options = {}) {
    options.micro_batch_size = micro_batch;
    options.generator = generator(7);
    clear_grad(model->parameters());
    microreg::Regularizer regularizer(model, cross_entropy, penalty, options);
    (void)regularizer.backward(batch.input, batch.target);
    return gradient();
  }
};

}  // namespace

TEST_CASE("Penalised in a loop over micro-batches gives the gradient of Regularizer", "[penalised]") {
  Scene s;
  const auto agrees = [&](const auto& penalty, double tolerance = 1e-12) {
    const torch::Tensor exact = s.expected(penalty, {.strength = 0.3});
    const auto run = [&](Penalised penalised, const auto& backward) {
      clear_grad(s.model->parameters());
      for (auto [part, x, y] : microreg::micro_batches(micro_batch, s.batch.input, s.batch.target)) {
        CHECK(penalised.step() == 0);
        backward(penalised, part, x, y);
      }
      CHECK(penalised.step() == 1);
      CHECK(relative_error(s.gradient(), exact) < tolerance);
    };
    const microreg::PenalisedOptions options{.strength = 0.3, .generator = generator(7)};
    const auto fresh = [&] {
      auto copy = options;
      copy.generator = generator(7);
      return copy;
    };
    run(Penalised(s.model->parameters(), penalty, fresh()),
        [&](auto& penalised, const auto& part, const auto& x, const auto& y) {
          const auto output = s.model->forward(x);
          penalised.backward(part, torch::cross_entropy_loss(output, y), output);
        });
    run(Penalised(s.model, penalty, fresh()), [&](auto& penalised, const auto& part, const auto& x, const auto& y) {
      penalised.backward(part, [&] {
        const auto output = s.model->forward(x);
        return std::pair{torch::cross_entropy_loss(output, y), output};
      });
    });
  };
  agrees(microreg::GradientNorm{});
  agrees(microreg::FisherTrace{});
  agrees(microreg::AverageJacobian{});
  agrees(microreg::UnitJacobian{});
  agrees(0.5 * microreg::GradientNorm{} + microreg::Unsquared{microreg::AverageJacobian{}});
  agrees(microreg::AnyPenalty<>(microreg::GradientNorm{}));
}

TEST_CASE("one line in place of loss.backward()", "[penalised]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(8);
  const auto loss_of = [&] { return torch::cross_entropy_loss(model->forward(batch.input), batch.target); };
  // Written by hand: double backward as textbooks have it.
  const auto parameters = model->parameters();
  clear_grad(parameters);
  torch::Tensor squares = torch::zeros({}, torch::kFloat64);
  const torch::Tensor plain = loss_of();
  for (const torch::Tensor& g : torch::autograd::grad({plain}, parameters, {}, true, true)) {
    squares = squares + g.square().sum();
  }
  (plain + 0.3 * squares).backward();
  const torch::Tensor exact = flat_grad(parameters);

  clear_grad(parameters);
  Penalised penalised(model->parameters(), microreg::GradientNorm{}, {.strength = 0.3});
  const auto report = penalised.backward(loss_of());
  CHECK(relative_error(flat_grad(parameters), exact) < 1e-13);
  CHECK(relative_error(report.loss, plain) < 1e-14);
  CHECK(relative_error(report.penalties[0].value, squares) < 1e-13);
  CHECK(relative_error(report.gradient_norm, exact.norm()) < 1e-13);
  CHECK(penalised.step() == 1);

  clear_grad(parameters);
  (void)penalised.backward([&] { return loss_of(); });
  CHECK(relative_error(flat_grad(parameters), exact) < 1e-13);
  CHECK(penalised.step() == 2);

  // The graph may begin anywhere: several modules, and parameters without one.
  torch::nn::Linear head(networks::classes, 2);
  head->to(torch::kFloat64);
  const torch::Tensor scale = torch::ones({}, torch::kFloat64).requires_grad_(true);
  Penalised both(microreg::modules(model, head), microreg::GradientNorm{});
  const auto named = microreg::modules(model, head).parameters();
  CHECK(named.front().name.rfind("modules[0].", 0) == 0);
  CHECK(named.back().name == "modules[1].bias");
  clear_grad(parameters);
  (void)both.backward((scale * head(model->forward(batch.input))).square().mean());
  CHECK(head->weight.grad().defined());
  CHECK(parameters.front().grad().defined());
  CHECK_FALSE(scale.grad().defined());
}

TEST_CASE("Penalised with a penalty by the input", "[penalised]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(4);
  const microreg::InputJacobian penalty{.expectation = microreg::Expectation::exact};
  clear_grad(model->parameters());
  microreg::Regularizer regularizer(model, cross_entropy, penalty);
  (void)regularizer.backward(batch.input, batch.target);
  const torch::Tensor exact = flat_grad(model->parameters());
  clear_grad(model->parameters());
  const auto x = batch.input.clone().requires_grad_(true);
  const auto output = model->forward(x);
  Penalised penalised(model->parameters(), penalty);
  (void)penalised.backward({.loss = torch::cross_entropy_loss(output, batch.target), .output = output, .input = x});
  CHECK(relative_error(flat_grad(model->parameters()), exact) < 1e-13);
}

TEST_CASE("Penalised by differences runs the closure again and leaves no trace of it", "[penalised]") {
  Scene s;
  const auto estimator = GENERATE(microreg::Estimator(microreg::ForwardDifference{.step = 1e-6}),
                                  microreg::Estimator(microreg::CentralDifference{.step = 1e-4}));
  clear_grad(s.model->parameters());
  auto twin = networks::seeded_cnn(networks::Norm::batch, networks::Activation::kinked);
  microreg::Regularizer regularizer(twin, cross_entropy, microreg::GradientNorm{}, {.estimator = estimator});
  (void)regularizer.backward(s.batch.input, s.batch.target);
  Penalised penalised(s.model, microreg::GradientNorm{}, {.estimator = estimator});
  int calls = 0;
  (void)penalised.backward([&] {
    ++calls;
    return torch::cross_entropy_loss(s.model->forward(s.batch.input), s.batch.target);
  });
  CHECK(calls > 1);
  CHECK(same_bits(s.gradient(), flat_grad(twin->parameters())));
  for (std::size_t i = 0; i < twin->buffers().size(); ++i) {
    CHECK(same_bits(s.model->buffers()[i], twin->buffers()[i]));
  }
}

TEST_CASE("what Penalised cannot do, it refuses with the remedy, and nothing has changed", "[penalised]") {
  Scene s;
  const auto parameters = s.model->parameters();
  const auto loss = torch::cross_entropy_loss(networks::seeded_mlp()->forward(networks::vectors(4).input),
                                              networks::vectors(4).target);
  const Watch watch(*s.model);
  const auto of = [&](const auto& penalty, microreg::PenalisedOptions options = {}) {
    return Penalised(parameters, penalty, std::move(options));
  };
  const microreg::PenalisedOptions difference{.estimator = microreg::ForwardDifference{}};
  CHECK(has(message_of<OptionError>([&] { (void)of(microreg::GradientNorm{}, difference).backward(loss); }),
            {"difference", "closure", "Exact"}));
  CHECK(has(
      message_of<OptionError>([&] { (void)of(microreg::GradientNorm{}, difference).backward([&] { return loss; }); }),
      {"difference", "buffers", "model"}));
  CHECK(has(message_of<ModelError>([&] { (void)of(microreg::FisherTrace{}).backward(loss); }),
            {"fisher_trace", "output", "backward(loss, output)"}));
  CHECK(has(message_of<ModelError>([&] { (void)of(microreg::InputJacobian{}).backward(loss, torch::ones({2, 2})); }),
            {"input_jacobian", "input"}));
  CHECK(has(message_of<ModelError>([&] { (void)of(microreg::GradientNorm{}).backward(loss); }),
            {"gradient_norm", "does not depend", "parameters[0]"}));
  CHECK(has(message_of<ModelError>([&] { (void)of(microreg::GradientNorm{}).backward(loss.detach()); }),
            {"loss", "graph"}));
  CHECK(has(message_of<ModelError>([&] { (void)of(microreg::GradientNorm{}).backward(torch::Tensor()); }),
            {"loss", "undefined"}));
  CHECK(has(message_of<OptionError>([&] { (void)of(microreg::GradientNorm{}, {.sampling = {.every = 0}}); }),
            {"sampling.every", "is 0"}));
  CHECK(has(message_of<OptionError>([&] { (void)of(microreg::GradientNorm{}).backward({.index = 3}, loss); }),
            {"part 3 of 1"}));
  for (const double weight : {0.0, -0.5, std::numeric_limits<double>::quiet_NaN()}) {
    CHECK(has(message_of<OptionError>([&] { (void)of(microreg::GradientNorm{}).backward({.weight = weight}, loss); }),
              {"part.weight"}));
  }
  CHECK(has(message_of<ModelError>([] { (void)microreg::modules(std::shared_ptr<torch::nn::Module>()); }),
            {"module 0", "null"}));
  CHECK(watch.unchanged());
  const torch::Tensor own = torch::ones({3}, torch::kFloat64).requires_grad_(true);
  own.mutable_grad() = torch::ones({3}, torch::kFloat64);
  Penalised penalised({own}, microreg::GradientNorm{}, {.check_finite = microreg::CheckFinite::always});
  CHECK_THROWS_AS(penalised.backward((own * std::numeric_limits<double>::quiet_NaN()).sum()), microreg::NonFiniteError);
  CHECK(penalised.step() == 0);
  CHECK(same_bits(own.grad(), torch::ones({3}, torch::kFloat64)));
}

TEST_CASE("a share of the parts is penalised as Regularizer penalises it", "[penalised]") {
  Scene s;
  const torch::Tensor exact = s.expected(microreg::GradientNorm{}, {.sampling = {.share = 0.5, .seed = 3}});
  clear_grad(s.model->parameters());
  Penalised penalised(s.model->parameters(), microreg::GradientNorm{}, {.sampling = {.share = 0.5, .seed = 3}});
  std::size_t chosen = 0;
  for (auto [part, x, y] : microreg::micro_batches(micro_batch, s.batch.input, s.batch.target)) {
    chosen += penalised.backward(part, torch::cross_entropy_loss(s.model->forward(x), y)).penalised.size();
  }
  CHECK(chosen < 3);
  CHECK(relative_error(s.gradient(), exact) < 1e-12);
}

TEST_CASE("an input that a penalty differentiates by has to require a gradient", "[penalised]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(8);
  microreg::Penalised penalised(model, microreg::InputJacobian{}, {.strength = 0.1});
  const auto step = [&](const torch::Tensor& input) {
    const torch::Tensor output = model->forward(input);
    (void)penalised.backward(microreg::PassTensors{torch::cross_entropy_loss(output, batch.target), output, input});
  };
  CHECK(has(message_of<microreg::ModelError>([&] { step(batch.input); }), {"PassTensors.input", "requires_grad_()"}));
  CHECK_NOTHROW(step(batch.input.detach().clone().requires_grad_()));
}

TEST_CASE("a part of a step is not left out alone", "[penalised]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(8);
  microreg::Penalised penalised(model, microreg::GradientNorm{},
                                {.strength = 0.1, .non_finite = microreg::NonFinite::skip_step});
  for (const auto& [part, x, y] : microreg::micro_batches(4, batch.input, batch.target)) {
    const torch::Tensor loss = torch::cross_entropy_loss(model->forward(x), y);
    const auto words = message_of<microreg::OptionError>([&, p = part] { (void)penalised.backward(p, loss); });
    CHECK(has(words, {"skip_step", "part", "of 2"}));
  }
  CHECK_NOTHROW(penalised.backward(torch::cross_entropy_loss(model->forward(batch.input), batch.target)));
}
