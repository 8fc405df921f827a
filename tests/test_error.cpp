// Bad input: the message names the field or tensor, the value and the remedy, and nothing has changed afterwards.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>

#include <limits>

using namespace helpers;
using microreg::BatchError;
using microreg::ModelError;
using microreg::NonFiniteError;
using microreg::OptionError;

namespace {

constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

torch::Tensor loss_of(const torch::Tensor& output, const torch::Tensor& y) {
  return torch::cross_entropy_loss(output, y);
}

/// A network with all that a step could disturb: BatchNorm statistics, one `.grad`, drawn labels.
struct Scene {
  Scene() { model->conv1->weight.mutable_grad() = torch::full_like(model->conv1->weight, 2.0); }

  /// The message of the error that a step with these things throws, after checking that nothing has changed.
  template <class Error, class Loss, class Penalty, class Input, class Target>
  std::string fails(const Loss& loss, const Penalty& penalty, const Input& x, const Target& y,
                    microreg::RegularizerOptions options = {.micro_batch_size = 4}) {
    microreg::Regularizer regularizer(model, loss, penalty, options);
    regularizer.set_step(3);
    const Watch watch(*model);
    const torch::Tensor own = options.generator.has_value() ? options.generator->get_state() : torch::Tensor();
    const std::string message = message_of<Error>([&] { (void)regularizer.backward(x, y); });
    CHECK(watch.unchanged());
    CHECK(regularizer.step() == 3);
    if (own.defined()) {
      CHECK(same_bits(own, options.generator->get_state()));
    }
    return message;
  }

  networks::Cnn model = networks::seeded_cnn(networks::Norm::batch, networks::Activation::kinked);
  networks::Samples batch = networks::images(10);
};

const auto drawing = microreg::GradientNorm{} + microreg::FisherTrace{} + microreg::UnitJacobian{};

}  // namespace

TEST_CASE("the watch itself sees a change", "[error]") {
  Scene s;
  const auto sees = [&](const auto& change) {
    const Watch watch(*s.model);
    REQUIRE(watch.unchanged());
    const torch::NoGradGuard no_grad;
    change();
    CHECK_FALSE(watch.unchanged());
  };
  sees([&] { s.model->conv2->bias.add_(1e-12); });
  sees([&] { s.model->norm1->running_mean.add_(1e-12); });
  sees([&] { s.model->conv1->weight.mutable_grad().add_(1e-12); });
  sees([&] { s.model->conv2->weight.mutable_grad() = torch::zeros_like(s.model->conv2->weight); });
  sees([&] { (void)torch::rand({}); });
  sees([&] { s.model->norm1->eval(); });
}

TEST_CASE("a batch that cannot be split", "[error]") {
  Scene s;
  const torch::Tensor x = s.batch.input;
  const torch::Tensor y = s.batch.target;
  SECTION("empty") {
    CHECK(has(s.fails<BatchError>(loss_of, drawing, x.narrow(0, 0, 0), y.narrow(0, 0, 0)),
              {"empty", "input", "0 samples", "skip"}));
  }
  SECTION("first dimensions differ") {
    CHECK(has(s.fails<BatchError>(loss_of, drawing, x, y.narrow(0, 0, 9)),
              {"first dimensions differ", "input has 10", "target has 9", "same samples"}));
  }
  SECTION("undefined tensor") {
    CHECK(has(s.fails<BatchError>(loss_of, drawing, torch::Tensor(), y), {"input", "undefined", "assign"}));
    CHECK(has(s.fails<BatchError>(loss_of, drawing, x, torch::Tensor()), {"target", "undefined", "assign"}));
  }
  SECTION("scalar target") {
    CHECK(has(s.fails<BatchError>(loss_of, drawing, x, helpers::tensor(1)), {"target", "scalar", "pass a number"}));
  }
  SECTION("on another device than the model") {
    CHECK(has(s.fails<BatchError>(loss_of, drawing, x.to(torch::kMeta), y),
              {"input", "meta", test_device().is_cpu() ? ".to(cpu)" : ".to(cuda:0)"}));
    CHECK(has(s.fails<BatchError>(loss_of, drawing, x, y.to(torch::kMeta)),
              {"target", "meta", test_device().is_cpu() ? ".to(cpu)" : ".to(cuda:0)"}));
  }
  SECTION("a shape the model rejects: its own error comes through") {
    CHECK(has(s.fails<c10::Error>(loss_of, drawing, x.narrow(1, 0, 1), y), {"channels"}));
  }
}

TEST_CASE("a loss that cannot be differentiated", "[error]") {
  Scene s;
  const auto fails = [&](const auto& loss) {
    return s.fails<ModelError>(loss, drawing, s.batch.input, s.batch.target);
  };
  CHECK(has(fails([](const torch::Tensor& o, const torch::Tensor& y) {
              return torch::cross_entropy_loss(o, y, {}, at::Reduction::None);
            }),
            {"loss", "[4]", "scalar", "Reduction::sum"}));
  CHECK(has(fails([](const torch::Tensor&, const torch::Tensor&) { return torch::Tensor(); }),
            {"loss", "undefined", "scalar"}));
  CHECK(has(fails([](const torch::Tensor& o, const torch::Tensor& y) { return loss_of(o.detach(), y); }),
            {"loss", "no graph", "detach"}));
  CHECK(has(fails([](const torch::Tensor& o, const torch::Tensor&) { return o.argmax(1).sum(); }),
            {"loss", "Long", "graph"}));
}

TEST_CASE("a model that cannot be penalised", "[error]") {
  Scene s;
  SECTION("no parameter requires a gradient") {
    for (torch::Tensor& parameter : s.model->parameters()) {
      parameter.requires_grad_(false);
    }
    CHECK(has(s.fails<ModelError>(loss_of, drawing, s.batch.input, s.batch.target),
              {"no parameter requires a gradient", "10 given", "requires_grad_(true)"}));
  }
  SECTION("select leaves nothing") {
    CHECK(has(s.fails<ModelError>(loss_of, drawing, s.batch.input, s.batch.target,
                                  {.select = [](const std::string&, const torch::Tensor&) { return false; }}),
              {"select", "none of the 10", "conv1.weight"}));
  }
  SECTION("complex parameter") {
    const torch::Tensor w = torch::randn({6, 2}, torch::kComplexFloat).requires_grad_(true);
    microreg::Regularizer regularizer(
        microreg::FunctionModel{[&](const torch::Tensor& x) { return torch::abs(x.matmul(w)); }, {w}}, loss_of,
        microreg::GradientNorm{});
    CHECK(has(message_of<ModelError>([&] { (void)regularizer.backward(torch::ones({4, 6}), torch::zeros({4})); }),
              {"parameters[0]", "ComplexFloat", "freeze"}));
  }
  SECTION("integer-typed output") {
    torch::nn::Linear layer(6, 3);
    microreg::Regularizer regularizer(
        microreg::FunctionModel{[&](const torch::Tensor& x) { return layer(x).argmax(1); }, layer->parameters()},
        [](const torch::Tensor& o, const torch::Tensor&) { return o.sum(); }, microreg::AverageJacobian{});
    const Watch watch(*layer);
    CHECK(has(message_of<ModelError>([&] { (void)regularizer.backward(torch::ones({4, 6}), torch::zeros({4})); }),
              {"output", "Long", "[4]", "floating-point"}));
    CHECK(watch.unchanged());
  }
}

TEST_CASE("a probe that cannot be differentiated", "[error]") {
  Scene s;
  const auto fails = [&](auto probe) {
    return s.fails<ModelError>(loss_of, drawing + microreg::SquaredGradientNorm{probe, "mine"}, s.batch.input,
                               s.batch.target);
  };
  CHECK(has(fails([](const torch::Tensor& o) { return o.detach().sum(); }), {"mine", "no graph", "detach"}));
  CHECK(has(fails([](const torch::Tensor& o) { return o.sum(1); }), {"mine", "[4]", "scalar"}));
  CHECK(has(fails([](const torch::Tensor&) { return torch::Tensor(); }), {"mine", "undefined"}));
  CHECK(has(fails([](const torch::Tensor& o) { return o.argmax(); }), {"mine", "Long", "floating-point"}));
  const torch::Tensor other = torch::ones({}, torch::kFloat64).requires_grad_(true);
  CHECK(has(fails([&](const torch::Tensor&) { return other * 2; }), {"mine", "does not depend", "conv1.weight"}));
}

TEST_CASE("values that are not finite", "[error]") {
  if (skipped_off_the_cpu("values are looked at on the CPU unless asked")) {
    return;
  }
  Scene s;
  SECTION("NaN in the third micro-batch") {
    s.batch.input[9] = not_a_number;
    microreg::Regularizer regularizer(s.model, loss_of, drawing, {.micro_batch_size = 4});
    const Watch watch(*s.model);
    try {
      (void)regularizer.backward(s.batch.input, s.batch.target);
      FAIL("no error was thrown");
    } catch (const NonFiniteError& error) {
      CHECK(error.micro_batch() == 2);
      CHECK(has(error.what(), {"loss", "nan", "micro-batch 2 of 3", "step 0", "learning rate"}));
    }
    CHECK(watch.unchanged());
  }
  SECTION("an infinite probe beside a finite loss") {
    const auto probe = [](const torch::Tensor& o) { return (o * 1e200).square().sum(); };
    CHECK(has(
        s.fails<NonFiniteError>(loss_of, microreg::SquaredGradientNorm{probe, "steep"}, s.batch.input, s.batch.target),
        {"steep", "micro-batch 0 of 3"}));
  }
  SECTION("not looked for if the user says so") {
    s.batch.input[9] = not_a_number;
    microreg::Regularizer regularizer(s.model, loss_of, microreg::GradientNorm{},
                                      {.micro_batch_size = 4, .check_finite = microreg::CheckFinite::never});
    const auto report = regularizer.backward(s.batch.input, s.batch.target);
    CHECK_THROWS_AS(report.throw_if_not_finite(), NonFiniteError);
  }
}

TEST_CASE("whatever throws in the second micro-batch, nothing has changed", "[error]") {
  Scene s;
  const auto options = GENERATE(0, 1) == 0
                           ? microreg::RegularizerOptions{.micro_batch_size = 4}
                           : microreg::RegularizerOptions{.micro_batch_size = 4, .generator = generator(8)};
  int calls = 0;
  SECTION("the loss") {
    s.fails<std::runtime_error>(
        [&](const torch::Tensor& o, const torch::Tensor& y) {
          (void)torch::rand({3});
          return ++calls == 2 ? throw std::runtime_error("loss") : loss_of(o, y);
        },
        drawing, s.batch.input, s.batch.target, options);
    CHECK(calls == 2);
  }
  SECTION("the probe") {
    const auto probe = [&](const torch::Tensor& o) {
      return ++calls == 2 ? throw std::domain_error("probe") : o.mean();
    };
    s.fails<std::domain_error>(loss_of, drawing + microreg::SquaredGradientNorm{probe}, s.batch.input, s.batch.target,
                               options);
  }
  SECTION("the model") {
    microreg::Regularizer regularizer(
        microreg::FunctionModel{[&](const torch::Tensor& x) {
                                  const torch::Tensor output = networks::Cnn(s.model)->forward(x);
                                  return ++calls == 2 ? throw std::domain_error("model") : output;
                                },
                                s.model->parameters(), s.model->buffers()},
        loss_of, drawing, options);
    const Watch watch(*s.model);
    message_of<std::domain_error>([&] { (void)regularizer.backward(s.batch.input, s.batch.target); });
    CHECK(watch.unchanged());
  }
}

TEST_CASE("an operation without a double backward is named, with the remedy", "[error]") {
  if (skipped_off_the_cpu("the CPU's attention")) {
    return;
  }
  torch::manual_seed(51);
  torch::nn::Linear projection(8, 8);
  const auto attention = [&](const torch::Tensor& x) {
    const torch::Tensor heads = projection(x).view({-1, 1, 4, 8});
    return std::get<0>(at::_scaled_dot_product_flash_attention_for_cpu(heads, heads, heads)).mean({1, 2});
  };
  microreg::Regularizer regularizer(microreg::FunctionModel{attention, projection->parameters()}, loss_of,
                                    microreg::GradientNorm{}, {.micro_batch_size = 2});
  const torch::Tensor x = torch::randn({4, 4, 8});
  const Watch watch(*projection);
  CHECK(has(message_of<ModelError>([&] { (void)regularizer.backward(x, torch::zeros({4}, torch::kInt64)); }),
            {"second derivative", "scaled_dot_product", "setSDPUseFlash(false)"}));
  CHECK(watch.unchanged());
}

TEST_CASE("a schedule is judged at its step", "[error]") {
  Scene s;
  const auto schedule = [](std::int64_t step) { return step < 3 ? 0.1 : not_a_number; };
  CHECK(has(s.fails<OptionError>(loss_of, drawing, s.batch.input, s.batch.target, {.strength = schedule}),
            {"strength", "at step 3", "nan", "finite"}));
}
