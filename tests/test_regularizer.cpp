// The step counter, modes, and precisions of Regularizer.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>

#include <functional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

using namespace helpers;

TEST_CASE("BatchNorm statistics move as in one plain forward pass over the micro-batches", "[regularizer]") {
  auto model = networks::seeded_cnn(networks::Norm::batch, networks::Activation::kinked);
  auto twin = networks::seeded_cnn(networks::Norm::batch, networks::Activation::kinked);
  const auto batch = networks::images(10);
  microreg::Regularizer regularizer(model, cross_entropy, microreg::GradientNorm{} + microreg::FisherTrace{},
                                    {.micro_batch_size = 4});
  (void)regularizer.backward(batch.input, batch.target);
  for (const torch::Tensor& part : batch.input.split(4)) {
    twin->forward(part);
  }
  for (std::size_t i = 0; i < twin->buffers().size(); ++i) {
    CHECK(same_bits(model->buffers()[i], twin->buffers()[i]));
  }
  CHECK(model->norm1->num_batches_tracked.item<std::int64_t>() == 3);
}

TEST_CASE("the loss and the penalty see the same dropout masks", "[regularizer]") {
  // With one pass, GN of a network with dropout is the gradient of the very loss that is reported.
  torch::manual_seed(101);
  torch::nn::Sequential model(torch::nn::Linear(6, 32), torch::nn::Dropout(0.5), torch::nn::Tanh(),
                              torch::nn::Linear(32, networks::classes));
  model->to(torch::kFloat64);
  const auto batch = networks::vectors(8);
  torch::manual_seed(102);
  microreg::Regularizer regularizer(model, cross_entropy, microreg::GradientNorm{}, {.strength = 0.0});
  const auto report = regularizer.backward(batch.input, batch.target);
  const double norm = flat_grad(model->parameters()).norm().item<double>();
  CHECK(report.penalties[0].micro_batch_norms[0].item<double>() == Approx(norm).epsilon(1e-12));
}

TEST_CASE("a step works inside NoGradGuard and leaves the mode alone", "[regularizer]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(8);
  microreg::Regularizer regularizer(model, cross_entropy, microreg::GradientNorm{}, {.micro_batch_size = 4});
  (void)regularizer.backward(batch.input, batch.target);
  const torch::Tensor expected = flat_grad(model->parameters());
  clear_grad(model->parameters());
  {
    const torch::NoGradGuard no_grad;
    (void)regularizer.backward(batch.input, batch.target);
    CHECK_FALSE(torch::GradMode::is_enabled());
  }
  CHECK(same_bits(flat_grad(model->parameters()), expected));
}

TEST_CASE("half types: norms add up in float32, gradients keep the parameters' type", "[regularizer]") {
  // In bfloat16 a sum of squares of equal terms stops growing after a few hundred; float32 goes on.
  const torch::Tensor w = torch::full({100000}, 0.5, torch::kBFloat16).requires_grad_(true);
  const microreg::FunctionModel model{
      [&](const torch::Tensor& x) { return (w.square() / 2).sum().expand({x.size(0)}); }, {w}};
  const auto mean = [](const torch::Tensor& output, const torch::Tensor&) { return output.mean(); };
  microreg::Regularizer regularizer(model, mean, microreg::GradientNorm{}, {.micro_batch_size = 2});
  const torch::Tensor x = torch::ones({2}, torch::kBFloat16);
  const auto report = regularizer.backward(x, x);
  // grad = w, so R = 100000 / 4 and its gradient is 2 w.
  CHECK(report.penalties[0].value.scalar_type() == torch::kFloat32);
  CHECK(report.penalties[0].value.item<double>() == Approx(25000.0).epsilon(1e-5));
  CHECK(w.grad().scalar_type() == torch::kBFloat16);
  CHECK(relative_error(w.grad(), 3 * w) < 1e-2);

  torch::manual_seed(103);
  torch::nn::Linear layer(8, 4);
  layer->to(torch::kBFloat16);
  const torch::Tensor input = torch::randn({8, 8});
  const torch::Tensor labels = torch::randint(4, {8});
  torch::nn::Linear exact(8, 4);
  {
    const torch::NoGradGuard no_grad;
    exact->weight.copy_(layer->weight);
    exact->bias.copy_(layer->bias);
  }
  const auto run = [&](torch::nn::Linear& any, torch::ScalarType type) {
    microreg::Regularizer step(any, cross_entropy, microreg::GradientNorm{} + microreg::AverageJacobian{},
                               {.micro_batch_size = 4});
    return step.backward(input.to(type), labels).penalties[0].value;
  };
  CHECK(relative_error(run(layer, torch::kBFloat16), run(exact, torch::kFloat32)) < 0.05);
  CHECK(relative_error(flat_grad(layer->parameters()), flat_grad(exact->parameters())) < 0.05);
}

namespace {

/// A member, assigned when the penalty is known.
class Trainer {
 public:
  explicit Trainer(const networks::Mlp& model) : model_(model) {}
  void penalise(const std::string& name) {
    if (name == "gradient_norm") {
      regularizer_ = {model_, cross_entropy, microreg::GradientNorm{}, {.micro_batch_size = 4}};
    } else {
      regularizer_ = {model_, cross_entropy, microreg::AverageJacobian{}, {.micro_batch_size = 4}};
    }
  }
  microreg::Report step(const networks::Samples& batch) { return regularizer_.backward(batch.input, batch.target); }

 private:
  networks::Mlp model_;
  microreg::Regularizer<> regularizer_;
};

}  // namespace

TEST_CASE("a Regularizer is a member, is assigned, moved and kept in containers", "[regularizer]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(10);
  const auto gradient = [&](const auto& step) {
    clear_grad(model->parameters());
    step();
    return flat_grad(model->parameters());
  };
  Trainer trainer(model);
  CHECK(has(message_of<microreg::OptionError>([&] { (void)trainer.step(batch); }), {"empty", "assign"}));
  std::vector<microreg::Regularizer<>> list;
  list.emplace_back(model, cross_entropy, microreg::GradientNorm{},
                    microreg::RegularizerOptions{.micro_batch_size = 4});
  list.emplace_back(model, cross_entropy, microreg::AverageJacobian{},
                    microreg::RegularizerOptions{.micro_batch_size = 4});
  const auto first = gradient([&] { (void)list[0].backward(batch.input, batch.target); });
  const auto second = gradient([&] { (void)list[1].backward(batch.input, batch.target); });
  CHECK(relative_error(first, second) > 1e-3);
  for (const auto& [name, expected] : {std::pair{"gradient_norm", first}, {"average_jacobian", second}}) {
    trainer.penalise(name);
    CHECK(same_bits(gradient([&] { (void)trainer.step(batch); }), expected));
  }
  // Copies count their steps alone; what is moved goes on where it was.
  microreg::Regularizer<> copy = list[0];
  (void)copy.backward(batch.input, batch.target);
  CHECK(copy.step() == list[0].step() + 1);
  const microreg::Regularizer<> moved = std::move(copy);
  CHECK(moved.step() == 2);
  static_assert(std::is_same_v<decltype(list)::value_type,
                               decltype(microreg::Regularizer(model, cross_entropy, microreg::FisherTrace{}))>);
}

TEST_CASE("the types of batch are read off the model and the loss", "[regularizer]") {
  using torch::Tensor;
  const auto plain = [](const Tensor& output, const Tensor&) { return output.mean(); };
  const auto type = [](const auto& model, const auto& loss) {
    return microreg::Regularizer(model, loss, microreg::GradientNorm{});
  };
  const Tensor w = torch::ones({3}).requires_grad_(true);
  const auto with = [&](auto function) { return microreg::FunctionModel{function, {w}}; };
  const auto one = with([&](const Tensor& x) { return x * w; });
  const auto two = with([&](const Tensor& x, const Tensor& y) { return x * y * w; });
  const auto list = with([&](const std::vector<Tensor>& x) { return x[0] * w; });
  const auto generic = with([&](const auto& x) { return x * w; });
  CHECK(std::is_same_v<decltype(type(one, plain)), microreg::Regularizer<>>);
  CHECK(std::is_same_v<decltype(type(two, plain)), microreg::Regularizer<std::tuple<Tensor, Tensor>>>);
  CHECK(std::is_same_v<decltype(type(list, plain)), microreg::Regularizer<std::vector<Tensor>>>);
  CHECK(std::is_same_v<decltype(type(generic, cross_entropy)), microreg::Regularizer<>>);
  const auto of_pair = [](const Tensor& output, const std::pair<Tensor, double>&) { return output.mean(); };
  CHECK(std::is_same_v<decltype(type(one, of_pair)), microreg::Regularizer<Tensor, std::pair<Tensor, double>>>);
  const auto alone = [](const Tensor& output) { return output.mean(); };
  CHECK(std::is_same_v<decltype(type(one, alone)), microreg::Regularizer<Tensor, microreg::NoTarget>>);
}

TEST_CASE("losses and models as people have them", "[regularizer]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(10);
  const auto gradient = [&](auto&& any_model, const auto& loss) {
    clear_grad(model->parameters());
    microreg::Regularizer regularizer(any_model, loss, microreg::GradientNorm{}, {.micro_batch_size = 4});
    (void)regularizer.backward(batch.input, batch.target);
    return flat_grad(model->parameters());
  };
  const torch::Tensor expected = gradient(model, cross_entropy);
  const auto agrees = [&](auto&& any_model, const auto& loss) {
    CHECK(relative_error(gradient(any_model, loss), expected) < 1e-14);
  };
  agrees(model, [](torch::Tensor& output, torch::Tensor& y) { return torch::cross_entropy_loss(output, y); });
  agrees(model, [](torch::Tensor output, torch::Tensor y) { return torch::cross_entropy_loss(output, y).view({1}); });
  agrees(model, std::function<torch::Tensor(const torch::Tensor&, const torch::Tensor&)>(cross_entropy));
  agrees(
      model, +[](const torch::Tensor& output, const torch::Tensor& y) { return torch::cross_entropy_loss(output, y); });
  agrees(microreg::FunctionModel{[&](torch::Tensor& x) { return model->forward(x); }, microreg::modules(model)},
         cross_entropy);
  // Without a target.
  clear_grad(model->parameters());
  microreg::Regularizer alone(model, [](const torch::Tensor& output) { return output.square().mean(); },
                              microreg::GradientNorm{}, {.micro_batch_size = 4});
  const auto report = alone.backward(batch.input);
  CHECK(relative_error(report.loss, model->forward(batch.input).square().mean()) < 1e-13);
  CHECK(report.micro_batches() == 3);
}

TEST_CASE("parts of the loss and outputs come back", "[regularizer]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(10);
  const auto loss = [](const torch::Tensor& output, const torch::Tensor& y) {
    const auto first = torch::cross_entropy_loss(output, y);
    const auto second = output.square().mean();
    return std::tuple{first + 0.1 * second, first, second};
  };
  const bool by_difference = GENERATE(false, true);
  microreg::RegularizerOptions options{.micro_batch_size = 4, .keep_outputs = true};
  if (by_difference) {
    options.estimator = microreg::ForwardDifference{};
  }
  microreg::Regularizer regularizer(model, loss, microreg::GradientNorm{}, options);
  const auto report = regularizer.backward(batch.input, batch.target);
  const torch::Tensor output = model->forward(batch.input);
  REQUIRE(report.loss_parts.size() == 2);
  CHECK(relative_error(report.loss_parts[0], torch::cross_entropy_loss(output, batch.target)) < 1e-13);
  CHECK(relative_error(report.loss_parts[1], output.square().mean()) < 1e-13);
  CHECK(relative_error(report.loss, report.loss_parts[0] + 0.1 * report.loss_parts[1]) < 1e-13);
  CHECK(relative_error(report.output(), output) < 1e-13);
  CHECK_FALSE(report.output().requires_grad());
  CHECK(report.micro_batch_outputs.size() == 3);
  CHECK(has(message_of<microreg::OptionError>([&] { (void)report.output(1); }), {"no output 1", "1 tensors"}));

  const auto measured =
      microreg::measure(model, loss, microreg::GradientNorm{}, batch.input, batch.target, {.micro_batch_size = 4});
  CHECK(relative_error(measured.loss_parts[1], output.square().mean()) < 1e-13);
  CHECK(has(message_of<microreg::OptionError>([&] { (void)measured.output(); }), {"keep_outputs"}));
}

TEST_CASE("the ratio of the gradients is that of penalty to loss", "[regularizer]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(10);
  const auto estimator =
      GENERATE(microreg::Estimator(microreg::Exact{}), microreg::Estimator(microreg::CentralDifference{.step = 1e-4}));
  const auto gradient = [&](double strength) {
    clear_grad(model->parameters());
    microreg::Regularizer regularizer(model, cross_entropy, microreg::GradientNorm{} + microreg::AverageJacobian{},
                                      {.strength = strength, .micro_batch_size = 4});
    (void)regularizer.backward(batch.input, batch.target);
    return flat_grad(model->parameters());
  };
  const torch::Tensor plain = gradient(0);
  const torch::Tensor ratio = (gradient(0.3) - plain).norm() / plain.norm();
  microreg::Regularizer regularizer(
      model, cross_entropy, microreg::GradientNorm{} + microreg::AverageJacobian{},
      {.strength = 0.3, .micro_batch_size = 4, .estimator = estimator, .gradient_ratio = true});
  CHECK(relative_error(regularizer.backward(batch.input, batch.target).gradient_ratio, ratio) < 1e-6);
  CHECK_FALSE(microreg::Regularizer(model, cross_entropy, microreg::GradientNorm{})
                  .backward(batch.input, batch.target)
                  .gradient_ratio.defined());
}

TEST_CASE("the ratio of the gradients where one of them is 0", "[regularizer]") {
  torch::Tensor w = torch::ones({1}, torch::kFloat64).requires_grad_();
  microreg::FunctionModel model{[&](const torch::Tensor& x) { return x * w; }, {w}};
  const torch::Tensor x = torch::ones({2, 1}, torch::kFloat64);
  const auto ratio = [&](const torch::Tensor& target, double strength) {
    const auto loss = [](const torch::Tensor& o, const torch::Tensor& y) { return (o - y).square().mean(); };
    microreg::Regularizer regularizer(model, loss, microreg::AverageJacobian{},
                                      {.strength = strength, .gradient_ratio = true});
    return regularizer.backward(x, target).gradient_ratio.item<double>();
  };
  // The Jacobian of x w is x, whose derivative by w is 0; of x w^2 it is not.
  CHECK(ratio(torch::zeros({2, 1}, torch::kFloat64), 1) == 0);
  microreg::FunctionModel square{[&](const torch::Tensor& in) { return in * w.square(); }, {w}};
  const auto loss = [](const torch::Tensor& o, const torch::Tensor& y) { return (o - y).square().mean(); };
  for (const double strength : {1.0, 0.0}) {
    microreg::Regularizer fitted(square, loss, microreg::AverageJacobian{},
                                 {.strength = strength, .gradient_ratio = true});
    const double found = fitted.backward(x, x).gradient_ratio.item<double>();  // the loss gradient is 0
    CHECK(found == (strength > 0 ? std::numeric_limits<double>::infinity() : 0));
  }
}

TEST_CASE("outputs are put together along the dimension of their samples", "[regularizer]") {
  torch::Tensor w = torch::ones({1}, torch::kFloat64).requires_grad_();
  const torch::Tensor x = torch::randn({3, 10, 2}, torch::kFloat64);  // [T, B, F]
  const auto model = [&](const torch::Tensor& in) { return in * w; };
  microreg::FunctionModel network{model, {w}};
  using Sequences = microreg::Along<1>;
  const auto loss = [](const torch::Tensor& output) { return output.square().mean(); };
  microreg::Regularizer<Sequences, microreg::NoTarget> regularizer(network, loss, microreg::GradientNorm{},
                                                                   {.micro_batch_size = 4, .keep_outputs = true});
  const auto report = regularizer.backward(Sequences(x));
  CHECK(same_bits(report.output(0, 1), x));
  CHECK(same_bits(report.output(0, -2), x));
  for (const std::int64_t dimension : {0, 2, 3, -4}) {
    CHECK(has(message_of<microreg::OptionError>([&] { (void)report.output(0, dimension); }),
              {"[3, 4, 2]", "dimension", "output(index, dimension)"}));
  }
}

TEST_CASE("a step may take several calls", "[regularizer]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(8);
  microreg::Regularizer regularizer(
      model, cross_entropy, microreg::GradientNorm{},
      {.strength = [](std::int64_t step) { return 1.0 + static_cast<double>(step); }, .advance = false});
  for (int call = 0; call < 2; ++call) {
    CHECK(regularizer.backward(batch.input, batch.target).penalties[0].strength == 1);
  }
  regularizer.advance();
  CHECK(regularizer.backward(batch.input, batch.target).penalties[0].strength == 2);
}

TEST_CASE("parts of the loss that cannot be averaged are refused", "[regularizer]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(10);
  const auto message = [&](const auto& parts_of) {
    const auto loss = [&](const torch::Tensor& output, const torch::Tensor& y) {
      return parts_of(torch::cross_entropy_loss(output, y), output);
    };
    microreg::Regularizer regularizer(model, loss, microreg::GradientNorm{}, {.micro_batch_size = 4});
    const Watch watch(*model);
    const std::string text =
        message_of<microreg::ModelError>([&] { (void)regularizer.backward(batch.input, batch.target); });
    CHECK(watch.unchanged());
    return text;
  };
  using torch::Tensor;
  CHECK(has(message([](const Tensor& value, const Tensor&) { return std::vector<Tensor>{Tensor(), value}; }),
            {"loss", "undefined"}));
  CHECK(has(message([](const Tensor& value, const Tensor&) { return std::pair{value, Tensor()}; }),
            {"loss[1]", "undefined"}));
  CHECK(has(message([](const Tensor& value, const Tensor& output) {
              return std::vector<Tensor>(output.size(0) == 4 ? 2 : 3, value);
            }),
            {"another number"}));
  CHECK(has(message([](const Tensor& value, const Tensor& output) { return std::pair{value, output.mean(1)}; }),
            {"shape"}));
}

TEST_CASE("a Regularizer that its own loss assigns to ends its step first", "[regularizer]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(8);
  microreg::Regularizer<> regularizer;
  const auto loss = [&](const torch::Tensor& output, const torch::Tensor& y) {
    regularizer = microreg::Regularizer<>();
    regularizer.set_step(7);
    return torch::cross_entropy_loss(output, y);
  };
  regularizer = {model, loss, microreg::GradientNorm{}, {.micro_batch_size = 4}};
  CHECK(regularizer.backward(batch.input, batch.target).micro_batches() == 2);
  CHECK(regularizer.step() == 8);  // the new one's, and one more
}
