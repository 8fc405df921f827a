// The options of a step: what is trained beside the model and what a loss sums, against formulas by hand, and what is
// out of range.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

using namespace helpers;
using microreg::FunctionModel;
using microreg::GradientNorm;
using microreg::ModelError;
using microreg::OptionError;
using microreg::OtherLeaves;
using microreg::Reduction;
using microreg::Regularizer;
using torch::Tensor;

namespace {

using TensorList = std::vector<Tensor>;

Tensor label_loss(const Tensor& o, const Tensor& y) { return torch::cross_entropy_loss(o, y); }

/// A loss with a parameter and a buffer of its own.
struct ScaledLossImpl : torch::nn::Module {
  ScaledLossImpl() : scale(register_parameter("scale", torch::full({2}, 0.3, torch::kFloat64))) {
    calls = register_buffer("calls", torch::zeros({1}));
  }
  Tensor forward(const Tensor& o, const Tensor& y) {
    calls.add_(1);
    return ((-scale).exp() * (o - y).square().mean(0) + scale).sum();
  }
  Tensor scale, calls;
};
TORCH_MODULE(ScaledLoss);

}  // namespace

TEST_CASE("parameters of a loss that is a module are trained", "[options]") {
  torch::manual_seed(1);
  torch::nn::Linear model(6, 2);
  model->to(torch::kFloat64);
  ScaledLoss loss;
  const Tensor x = torch::randn({8, 6}, torch::kFloat64), y = torch::randn({8, 2}, torch::kFloat64);
  TensorList all = model->parameters();
  all.push_back(loss->scale);
  const Tensor expected = step_by_hand({loss(model(x), y)}, {1}, {1}, 0.5, all);
  loss->calls.zero_();
  Regularizer r(model, loss, GradientNorm{}, {.strength = 0.5});
  (void)r.backward(x, y);
  CHECK(relative_error(flat_grad(all), expected) < 1e-13);
  CHECK(loss->calls.item<float>() == 1);
  (void)microreg::measure(model, loss, GradientNorm{}, x, y);
  CHECK(loss->calls.item<float>() == 1);  // a buffer of the loss
  // Left out of the penalty by its name.
  clear_grad(all);
  Regularizer some(model, loss, GradientNorm{}, {.strength = 0.5, .select = [](const std::string& name, const Tensor&) {
                                                   return name != "loss.scale";
                                                 }});
  const auto report = some.backward(x, y);
  double value = 0;
  for (const Tensor& g : torch::autograd::grad({loss(model(x), y)}, model->parameters())) {
    value += g.square().sum().item<double>();
  }
  CHECK(report.penalties[0].value.item<double>() == Approx(value));
}

TEST_CASE("other leaves are trained, refused or ignored", "[options]") {
  torch::manual_seed(2);
  torch::nn::Linear model(6, 5), encoder(4, 6);
  model->to(torch::kFloat64);
  encoder->to(torch::kFloat64);
  const Tensor raw = torch::randn({8, 4}, torch::kFloat64), y = torch::randint(5, {8});
  TensorList all = model->parameters();
  for (const Tensor& p : encoder->parameters()) {
    all.push_back(p);
  }
  const auto encoded = [&] { return torch::tanh(encoder(raw)); };
  TensorList losses;
  for (int i = 0; i < 4; ++i) {
    losses.push_back(label_loss(model(encoded().narrow(0, 2 * i, 2)), y.narrow(0, 2 * i, 2)));
  }
  const std::vector<double> quarter(4, 0.25);
  const Tensor expected = step_by_hand(losses, quarter, quarter, 0.5, all);
  for (const double strength : {0.5, 0.0}) {
    clear_grad(all);
    Regularizer r(model, label_loss, GradientNorm{},
                  {.strength = strength, .micro_batch_size = 2, .also_train = encoder->parameters()});
    (void)r.backward(encoded(), y);
    if (strength > 0) {
      CHECK(relative_error(flat_grad(all), expected) < 1e-13);
    } else {
      CHECK(encoder->weight.grad().defined());
    }
  }
  clear_grad(all);
  const auto ignoring = OtherLeaves::ignored;
  Regularizer r(model, label_loss, GradientNorm{}, {.other_leaves = ignoring});
  (void)r.backward(encoded(), y);
  CHECK(model->weight.grad().defined());
  CHECK_FALSE(encoder->weight.grad().defined());
  clear_grad(all);
  microreg::Penalised refusing(model->parameters(), GradientNorm{}, {.other_leaves = OtherLeaves::refused});
  CHECK(has(message_of<ModelError>([&] { (void)refusing.backward(label_loss(model(encoded()), y)); }),
            {"no parameter", "other_leaves"}));
  CHECK_FALSE(model->weight.grad().defined());
  microreg::Penalised some(model->parameters(), GradientNorm{});
  CHECK_NOTHROW((void)some.backward(label_loss(model(encoded()), y)));
  CHECK(has(message_of<OptionError>(
                [&] { Regularizer bad(model, label_loss, GradientNorm{}, {.also_train = {torch::zeros({2})}}); }),
            {"also_train[0]", "require a gradient"}));
}

TEST_CASE("leaves that a pass makes for itself are not refused", "[options]") {
  torch::manual_seed(3);
  networks::Mlp model = networks::seeded_mlp();
  const auto batch = networks::vectors(8);
  const auto forward = [&](const Tensor& x) {
    const Tensor points = x.clone().requires_grad_(true);  // a physics-informed network
    const Tensor o = model->forward(points);
    return o + torch::autograd::grad({o.sum()}, {points}, {}, true, true)[0].square().sum(1, true);
  };
  for (const bool fused : {true, false}) {
    Regularizer r(FunctionModel{forward, model->parameters()}, label_loss, GradientNorm{},
                  {.micro_batch_size = 4, .fused = fused});
    CHECK_NOTHROW((void)r.backward(batch.input, batch.target));
  }
  microreg::Penalised p(model->parameters(), GradientNorm{}, {.other_leaves = OtherLeaves::refused});
  CHECK_NOTHROW((void)p.backward([&] { return label_loss(forward(batch.input), batch.target); }));
}

TEST_CASE("a sum whose scale is kept", "[options]") {
  networks::Mlp model = networks::seeded_mlp();
  const auto batch = networks::vectors(10);
  const auto sum = [](const Tensor& o, const Tensor& y) {
    return torch::cross_entropy_loss(o, y, {}, at::Reduction::Sum);
  };
  Regularizer r(model, sum, GradientNorm{}, {.strength = 0.5, .micro_batch_size = 4, .reduction = Reduction::total});
  const auto report = r.backward(batch.input, batch.target);
  TensorList means;
  for (const std::int64_t begin : {0, 4, 8}) {
    const std::int64_t size = std::min<std::int64_t>(4, 10 - begin);
    means.push_back(
        label_loss(model->forward(batch.input.narrow(0, begin, size)), batch.target.narrow(0, begin, size)));
  }
  const Tensor expected = step_by_hand(means, {4, 4, 2}, {0.4, 0.4, 0.2}, 0.5, model->parameters());
  CHECK(relative_error(flat_grad(model->parameters()), expected) < 1e-13);
  const double whole = sum(model->forward(batch.input), batch.target).item<double>();
  CHECK(report.loss.item<double>() == Approx(whole).epsilon(1e-12));
  // Parts have the scale of the loss.
  const auto with_parts = [&](const Tensor& o, const Tensor& y) {
    const Tensor loss = sum(o, y);
    return std::tuple{loss, loss / 4, loss * 3 / 4};
  };
  Regularizer of_parts(model, with_parts, GradientNorm{}, {.micro_batch_size = 4, .reduction = Reduction::total});
  const auto parts = of_parts.backward(batch.input, batch.target).loss_parts;
  CHECK(parts[0].item<double>() == Approx(whole / 4).epsilon(1e-12));
  CHECK(parts[1].item<double>() == Approx(whole * 3 / 4).epsilon(1e-12));
  // What is no sum over samples is refused.
  const auto counted = [&](const Tensor& o, const Tensor& y) {
    return microreg::CountedLoss{sum(o, y), torch::tensor(o.size(0))};
  };
  Regularizer of_counts(model, counted, GradientNorm{}, {.micro_batch_size = 4, .reduction = Reduction::total});
  CHECK(has(message_of<OptionError>([&] { (void)of_counts.backward(batch.input, batch.target); }),
            {"Reduction::total", "CountedLoss"}));
  CHECK(has(message_of<OptionError>([&] {
              Regularizer(
                  model, sum, GradientNorm{},
                  {.micro_batch_size = 4, .weighting = microreg::Weighting::reference, .reduction = Reduction::total});
            }),
            {"Reduction::total", "Weighting::reference"}));
}

TEST_CASE("options out of range", "[options]") {
  constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();
  networks::Cnn model = networks::seeded_cnn(networks::Norm::batch, networks::Activation::kinked);
  const auto build = [&](microreg::RegularizerOptions options) {
    const Watch watch(*model);
    const std::string message = message_of<OptionError>([&] {
      Regularizer r(model, label_loss, GradientNorm{} + microreg::FisherTrace{} + microreg::UnitJacobian{},
                    std::move(options));
    });
    CHECK(watch.unchanged());
    return message;
  };
  CHECK(has(build({.micro_batch_size = 0}), {"micro_batch_size", "is 0", "at least 1"}));
  CHECK(has(build({.micro_batch_size = -3}), {"micro_batch_size", "is -3", "at least 1"}));
  CHECK(has(build({.generator = at::Generator()}), {"generator", "undefined", "make_generator"}));
  CHECK(has(build({.sampling = {.share = 0.0}}), {"sampling.share", "0", "greater than 0"}));
  CHECK(has(build({.sampling = {.share = 1.5}}), {"sampling.share", "1.5", "at most 1"}));
  CHECK(has(build({.sampling = {.share = not_a_number}}), {"sampling.share", "nan"}));
  CHECK(has(build({.sampling = {.every = 0}}), {"sampling.every", "0", "at least 1"}));
  CHECK(has(build({.workers = -1}), {"workers", "-1", "number of threads"}));
  CHECK(has(build({.autocast = torch::kFloat64}), {"autocast", "Double", "BFloat16 or Half"}));
  CHECK(has(build({.also_train = {Tensor()}}), {"also_train[0]", "undefined"}));
}
