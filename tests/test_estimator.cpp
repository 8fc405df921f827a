// Differences against double backward: scale, accuracy, and that the further passes leave no trace.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>

#include <algorithm>
#include <functional>
#include <utility>

using namespace helpers;
using microreg::CentralDifference;
using microreg::Exact;
using microreg::ForwardDifference;
using microreg::Gates;

namespace {

microreg::RegularizerOptions options_with(const microreg::Estimator& estimator, double strength = 1.0) {
  return {.strength = strength, .micro_batch_size = 4, .estimator = estimator, .generator = generator(3)};
}

/// The gradient of one step, all random numbers from fixed seeds.
template <class Model, class Penalty>
torch::Tensor step_gradient(Model& model, const networks::Samples& batch, const Penalty& penalty,
                            const microreg::RegularizerOptions& options) {
  clear_grad(model->parameters());
  torch::manual_seed(5);
  microreg::Regularizer regularizer(model, cross_entropy, penalty, options);
  (void)regularizer.backward(batch.input, batch.target);
  return flat_grad(model->parameters());
}

/// The part of it that the penalty adds.
template <class Model, class Penalty>
torch::Tensor penalty_gradient(Model& model, const networks::Samples& batch, const Penalty& penalty,
                               const microreg::Estimator& estimator) {
  return step_gradient(model, batch, penalty, options_with(estimator)) -
         step_gradient(model, batch, penalty, options_with(Exact{}, 0.0));
}

/// Error against Exact.
template <class Model, class Penalty>
double error_of(Model& model, const networks::Samples& batch, const Penalty& penalty,
                const microreg::Estimator& estimator) {
  return relative_error(penalty_gradient(model, batch, penalty, estimator),
                        penalty_gradient(model, batch, penalty, Exact{}));
}

/// The error falls as the step, or its square: of the same scale, and not by chance. On networks that are kinked the
/// gates have to be frozen for it.
template <class Model, class Penalty>
void check_convergence(Model model, const networks::Samples& batch, const Penalty& penalty, Gates gates) {
  const double coarse = error_of(model, batch, penalty, ForwardDifference{1e-3, gates});
  const double fine = error_of(model, batch, penalty, ForwardDifference{1e-4, gates});
  CHECK(coarse < 0.02);
  CHECK(coarse / fine == Approx(10).epsilon(0.1));
  const double central_coarse = error_of(model, batch, penalty, CentralDifference{4e-2, gates});
  const double central_fine = error_of(model, batch, penalty, CentralDifference{4e-3, gates});
  CHECK(central_coarse < 0.02);
  CHECK(central_coarse / central_fine == Approx(100).epsilon(0.1));
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

/// Convolutions with ReLU and max pooling, with random widths and weights.
torch::nn::Sequential random_relu_network(bool batch_norm, torch::ScalarType type) {
  torch::nn::Sequential network;
  std::int64_t channels = 2;
  for (int block = 0; block < 2; ++block) {
    const std::int64_t width = torch::randint(4, 12, {1}).item<std::int64_t>();
    network->push_back(torch::nn::Conv2d(torch::nn::Conv2dOptions(channels, width, 3).padding(1)));
    if (batch_norm) {
      network->push_back(torch::nn::BatchNorm2d(width));
    }
    network->push_back(torch::nn::ReLU());
    network->push_back(torch::nn::MaxPool2d(2));
    channels = width;
  }
  network->push_back(torch::nn::Flatten());
  network->push_back(torch::nn::Linear(channels * 4, networks::classes));
  network->to(type);
  return network;
}

/// Median error over random networks at the default step.
double median_error(bool batch_norm, torch::ScalarType type, const microreg::Estimator& estimator) {
  std::vector<double> errors;
  for (std::uint64_t seed = 0; seed < 9; ++seed) {
    torch::manual_seed(seed);
    torch::nn::Sequential network = random_relu_network(batch_norm, type);
    const networks::Samples batch{torch::randn({16, 2, 8, 8}, torch::kFloat64).to(type),
                                  torch::randint(networks::classes, {16})};
    errors.push_back(error_of(network, batch, microreg::GradientNorm{}, estimator));
  }
  return median(errors);
}

struct DropoutNetImpl : torch::nn::Module {
  DropoutNetImpl() {
    hidden = register_module("hidden", torch::nn::Linear(6, 16));
    output = register_module("output", torch::nn::Linear(16, networks::classes));
  }
  torch::Tensor forward(const torch::Tensor& x) {
    return output(torch::dropout(torch::tanh(hidden(x)), 0.5, is_training()));
  }
  torch::nn::Linear hidden{nullptr}, output{nullptr};
};
TORCH_MODULE(DropoutNet);

/// An MLP that calls back before each forward pass.
struct WatchedImpl : torch::nn::Module {
  WatchedImpl() {
    hidden = register_module("hidden", torch::nn::Linear(6, 8));
    output = register_module("output", torch::nn::Linear(8, networks::classes));
    count = register_buffer("count", torch::zeros({}));
    to(torch::kFloat64);
  }
  torch::Tensor forward(const torch::Tensor& x) {
    count.add_(1);
    before(++calls);
    torch::Tensor h = hidden(x);
    h = calls == skip_relu_in ? h : torch::relu(h);
    return extra.defined() ? output(h) + extra : output(h);
  }
  std::function<void(int)> before = [](int) {};
  int calls = 0;
  int skip_relu_in = 0;
  torch::nn::Linear hidden{nullptr}, output{nullptr};
  torch::Tensor count, extra;
};
TORCH_MODULE(Watched);

/// Where every parameter is in memory.
std::vector<const void*> addresses(const torch::nn::Module& module) {
  std::vector<const void*> result;
  for (const torch::Tensor& parameter : module.parameters()) {
    result.push_back(parameter.const_data_ptr());
  }
  return result;
}

const auto everything = 0.3 * microreg::GradientNorm{} + microreg::FisherTrace<>{.draws = 2} +
                        0.1 * microreg::AverageJacobian{} + microreg::UnitJacobian{.directions = 2} +
                        microreg::Unsquared{microreg::GradientNorm{}} + microreg::InputJacobian{};

}  // namespace

TEST_CASE("differences have the scale of double backward, and converge to it", "[estimator]") {
  const auto check_on = [](auto model, const networks::Samples& batch, Gates gates) {
    const auto check = [&](const auto& penalty) { check_convergence(model, batch, penalty, gates); };
    SECTION("gradient norm") { check(microreg::GradientNorm{}); }
    SECTION("Fisher trace") { check(microreg::FisherTrace{}); }
    SECTION("exact Fisher trace") { check(microreg::FisherTrace<>{.expectation = microreg::Expectation::exact}); }
    SECTION("average Jacobian") { check(microreg::AverageJacobian{}); }
    SECTION("unit Jacobian") { check(microreg::UnitJacobian{.directions = 2, .scale_by_outputs = true}); }
    SECTION("Jacobian norm") { check(microreg::JacobianNorm{}); }
    SECTION("input Jacobian") { check(microreg::InputJacobian{.projections = 2}); }
    SECTION("unsquared") { check(microreg::Unsquared{microreg::GradientNorm{}}); }
    SECTION("unsquared, several probes") { check(microreg::Unsquared{microreg::JacobianNorm{}}); }
    SECTION("a sum") { check(everything); }
    SECTION("a sum with the loss last") { check(microreg::AverageJacobian{} + 0.3 * microreg::GradientNorm{}); }
  };
  SECTION("MLP") { check_on(networks::seeded_mlp(), networks::vectors(10), Gates::free); }
  SECTION("CNN with BatchNorm") {
    check_on(networks::seeded_cnn(networks::Norm::batch, networks::Activation::smooth), networks::images(10),
             Gates::free);
  }
}

TEST_CASE("frozen gates converge on kinked networks, free ones do not", "[estimator]") {
  auto model = networks::seeded_cnn(networks::Norm::batch, networks::Activation::kinked);
  const auto batch = networks::images(40);
  check_convergence(model, batch, microreg::GradientNorm{}, Gates::frozen);
  CHECK(error_of(model, batch, microreg::GradientNorm{}, ForwardDifference{1e-2, Gates::free}) > 0.5);
  CHECK(error_of(model, batch, everything, CentralDifference{}) < 1e-6);
}

TEST_CASE("the default step is accurate on random ReLU networks", "[estimator]") {
  const bool batch_norm = GENERATE(false, true);
  CHECK(median_error(batch_norm, torch::kFloat32, ForwardDifference{}) < 0.005);
  CHECK(median_error(batch_norm, torch::kFloat64, CentralDifference{}) < 1e-6);
  CHECK(median_error(batch_norm, torch::kFloat32, CentralDifference{}) < 0.001);
  CHECK(median_error(batch_norm, torch::kFloat64, ForwardDifference{}) < 1e-5);
}

TEST_CASE("the report of a difference is that of the exact step", "[estimator]") {
  auto model = networks::seeded_cnn(networks::Norm::batch, networks::Activation::kinked);
  const auto batch = networks::images(10);
  const auto report_of = [&](const microreg::Estimator& estimator) {
    microreg::Regularizer regularizer(model, cross_entropy, everything, options_with(estimator));
    return regularizer.backward(batch.input, batch.target);
  };
  const auto exact = report_of(Exact{});
  const auto difference = report_of(ForwardDifference{});
  CHECK(relative_error(difference.micro_batch_losses, exact.micro_batch_losses) < 1e-14);
  for (std::size_t i = 0; i < exact.penalties.size(); ++i) {
    CHECK(relative_error(difference.penalties[i].value, exact.penalties[i].value) < 1e-12);
    CHECK(relative_error(difference.penalties[i].micro_batch_norms, exact.penalties[i].micro_batch_norms) < 1e-12);
  }
  CHECK(relative_error(difference.gradient_norm, exact.gradient_norm) < 1e-5);
}

TEST_CASE("a difference leaves parameters, buffers and generators as an exact step does", "[estimator]") {
  const auto estimator = GENERATE(microreg::Estimator(ForwardDifference{}), microreg::Estimator(CentralDifference{}));
  auto model = networks::seeded_cnn(networks::Norm::batch, networks::Activation::kinked);
  const auto batch = networks::images(10);
  const auto parameters = clones(model->parameters());
  const auto buffers = clones(model->buffers());
  struct After {
    std::vector<torch::Tensor> buffers;
    torch::Tensor default_state, own_state;
  };
  const auto after = [&](const microreg::Estimator& which) {
    const torch::NoGradGuard no_grad;
    for (std::size_t i = 0; i < buffers.size(); ++i) {
      model->buffers()[i].copy_(buffers[i]);
    }
    const auto options = options_with(which);
    (void)step_gradient(model, batch, everything, options);
    return After{clones(model->buffers()), at::globalContext().defaultGenerator(test_device()).get_state(),
                 options.generator->get_state()};
  };
  const After exact = after(Exact{});
  const After difference = after(estimator);
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    CHECK(same_bits(model->parameters()[i], parameters[i]));
  }
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    CHECK(same_bits(difference.buffers[i], exact.buffers[i]));
  }
  CHECK(same_bits(difference.default_state, exact.default_state));
  CHECK(same_bits(difference.own_state, exact.own_state));
}

TEST_CASE("dropout draws the same masks in every pass", "[estimator]") {
  torch::manual_seed(8);
  DropoutNet model;
  model->to(torch::kFloat64);
  const auto batch = networks::vectors(10);
  check_convergence(model, batch, microreg::GradientNorm{}, Gates::frozen);
  CHECK(error_of(model, batch, everything, CentralDifference{}) < 1e-6);
}

TEST_CASE("a probe that draws without pass.draw sees the same numbers in every pass", "[estimator]") {
  auto model = networks::seeded_mlp();
  const microreg::SquaredGradientNorm noisy{[](const auto& pass) {
    return (pass.output * torch::empty_like(pass.output).normal_(0, 1, pass.generator)).mean();
  }};
  const microreg::SquaredGradientNorm from_default{
      [](const torch::Tensor& output) { return (output * torch::randn_like(output)).mean(); }};
  const auto penalty = microreg::FisherTrace{} + noisy + microreg::UnitJacobian{} + from_default;
  CHECK(error_of(model, networks::vectors(10), penalty, CentralDifference{}) < 1e-6);
}

TEST_CASE("labels do not flip where the logits move", "[estimator]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(4);
  std::vector<torch::Tensor> used;
  std::vector<torch::Tensor> outputs;  // looked at afterwards: a further pass decides as the first one did
  const microreg::FisherTrace most_likely{
      microreg::Distribution{[](const torch::Tensor& output, const auto&) { return output.argmax(1); },
                             [&](const torch::Tensor& output, const torch::Tensor& labels) {
                               used.push_back(labels.clone());
                               outputs.push_back(output.clone());
                               return torch::cross_entropy_loss(output, labels);
                             }}};
  (void)step_gradient(model, batch, most_likely, options_with(ForwardDifference{.step = 30.0, .check_every = 0}));
  REQUIRE(used.size() == 2);
  CHECK_FALSE(torch::equal(used[1], outputs[1].argmax(1)));  // it would flip
  CHECK(torch::equal(used[0], used[1]));
}

TEST_CASE("a selection is displaced alone", "[estimator]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(4);
  const torch::Tensor bias = model->output->bias.detach().clone();
  const auto select = [](const std::string&, const at::Tensor& p) { return p.dim() > 1; };
  int passes = 0;
  const torch::Tensor weight = model->output->weight.detach().clone();
  std::vector<torch::Tensor> biases;  // looked at afterwards, as they were
  std::vector<torch::Tensor> weights;
  const auto loss = [&](const torch::Tensor& output, const torch::Tensor& y) {
    ++passes;
    biases.push_back(model->output->bias.clone());
    weights.push_back(model->output->weight.clone());
    return torch::cross_entropy_loss(output, y);
  };
  const auto gradient = [&](const microreg::Estimator& estimator) {
    clear_grad(model->parameters());
    auto options = options_with(estimator);
    options.select = select;
    microreg::Regularizer regularizer(model, loss, microreg::GradientNorm{} + microreg::AverageJacobian{}, options);
    (void)regularizer.backward(batch.input, batch.target);
    return flat_grad(model->parameters());
  };
  const torch::Tensor exact = gradient(Exact{});
  CHECK(passes == 1);
  CHECK(relative_error(gradient(CentralDifference{.check_every = 0}), exact) < 1e-8);
  CHECK(passes == 6);
  const auto moved = [](const std::vector<torch::Tensor>& values, const torch::Tensor& from) {
    return std::any_of(values.begin(), values.end(), [&](const auto& value) { return !torch::equal(value, from); });
  };
  CHECK_FALSE(moved(biases, bias));
  CHECK(moved(weights, weight));
}

TEST_CASE("a zero gradient gives a zero, not NaN", "[estimator]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(8);
  const auto parameters = clones(model->parameters());
  const auto no_loss = [](const torch::Tensor& output, const torch::Tensor&) { return (output * 0).sum(); };
  const auto estimator = GENERATE(microreg::Estimator(Exact{}), microreg::Estimator(ForwardDifference{}),
                                  microreg::Estimator(CentralDifference{}));
  microreg::Regularizer regularizer(model, no_loss,
                                    microreg::GradientNorm{} + microreg::Unsquared{microreg::GradientNorm{}},
                                    options_with(estimator));
  const auto report = regularizer.backward(batch.input, batch.target);
  CHECK(report.gradient_norm.item<double>() == 0);
  CHECK(report.penalties[1].value.item<double>() == 0);
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    CHECK(same_bits(model->parameters()[i], parameters[i]));
  }
}

TEST_CASE("an error in a further pass leaves everything as it was", "[estimator]") {
  torch::manual_seed(9);
  Watched model;
  const auto batch = networks::vectors(8);
  const auto options = options_with(ForwardDifference{.check_every = 0});
  microreg::Regularizer regularizer(model, cross_entropy, microreg::GradientNorm{} + microreg::UnitJacobian{}, options);
  model->hidden->weight.mutable_grad() = torch::ones_like(model->hidden->weight);
  const torch::Tensor own = options.generator->get_state();
  const torch::Tensor weight = model->hidden->weight.detach().clone();
  const auto memory = addresses(*model);
  const Watch watch(*model);
  SECTION("thrown by the model, while its parameters are displaced") {
    const int failing = GENERATE(2, 3, 5);  // either further pass of the first micro-batch, one of the second
    bool displaced = false;
    model->before = [&](int call) {
      if (call == failing) {
        displaced = !torch::equal(weight, model->hidden->weight);
        throw std::domain_error("in a further pass");
      }
    };
    message_of<std::domain_error>([&] { (void)regularizer.backward(batch.input, batch.target); });
    CHECK(displaced);
  }
  SECTION("a forward pass that does not repeat itself") {
    model->skip_relu_in = 2;
    const auto message =
        message_of<microreg::GateError>([&] { (void)regularizer.backward(batch.input, batch.target); });
    CHECK(has(message, {"relu"}));
  }
  CHECK(watch.unchanged());
  CHECK(addresses(*model) == memory);
  CHECK(same_bits(own, options.generator->get_state()));
  CHECK(regularizer.step() == 0);

  model->before = [](int) {};
  model->skip_relu_in = 0;
  (void)regularizer.backward(batch.input, batch.target);
  CHECK(model->count.item<double>() == 2);  // one pass per micro-batch, as far as buffers know
}

TEST_CASE("a difference leaves parameters where they are in memory", "[estimator]") {
  torch::manual_seed(9);
  Watched model;
  const auto batch = networks::vectors(8);
  const auto memory = addresses(*model);
  const auto values = clones(model->parameters());
  torch::Tensor& weight = model->hidden->weight;
  const torch::Tensor alias = weight.detach();
  const torch::Tensor graph = weight.square().sum();  // keeps the weight and its version
  model->before = [&](int call) {
    if (call == 2) {
      CHECK(addresses(*model) != memory);
      CHECK_FALSE(torch::equal(weight, values[0]));
      CHECK(alias.is_alias_of(weight));
      CHECK(same_bits(alias, weight.detach()));
    }
  };
  (void)step_gradient(model, batch, everything, options_with(ForwardDifference{}));
  CHECK(addresses(*model) == memory);
  for (std::size_t i = 0; i < values.size(); ++i) {
    CHECK(same_bits(model->parameters()[i], values[i]));
  }
  clear_grad(model->parameters());
  CHECK_NOTHROW(graph.backward());
  CHECK(same_bits(weight.grad(), 2 * values[0]));
}

TEST_CASE("parameters that share a storage are displaced and restored", "[estimator]") {
  torch::manual_seed(9);
  Watched model;
  const auto batch = networks::vectors(8);
  const auto penalty = microreg::GradientNorm{} + microreg::UnitJacobian{};
  const torch::Tensor expected = penalty_gradient(model, batch, penalty, ForwardDifference{});
  SECTION("as parts of one flat tensor") {
    std::vector<torch::Tensor> parts;
    for (const torch::Tensor& parameter : model->parameters()) {
      parts.push_back(parameter.detach().flatten());
    }
    const torch::Tensor flat = torch::cat(parts);
    std::int64_t begin = 0;
    for (torch::Tensor parameter : model->parameters()) {
      parameter.set_data(flat.narrow(0, begin, parameter.numel()).view_as(parameter));
      begin += parameter.numel();
    }
    const torch::Tensor before = flat.clone();
    const auto memory = addresses(*model);
    CHECK(relative_error(penalty_gradient(model, batch, penalty, ForwardDifference{}), expected) < 1e-14);
    CHECK(same_bits(flat, before));
    CHECK(addresses(*model) == memory);
  }
  SECTION("with a buffer") {
    (void)model->register_buffer("same", model->hidden->weight.detach());
    CHECK(relative_error(penalty_gradient(model, batch, penalty, ForwardDifference{}), expected) < 1e-14);
  }
  SECTION("with gaps") {
    torch::Tensor& weight = model->hidden->weight;
    const torch::Tensor wide = torch::zeros({weight.size(0), 2 * weight.size(1)}, torch::kFloat64);
    wide.narrow(1, 0, weight.size(1)).copy_(weight.detach());
    weight.set_data(wide.narrow(1, 0, weight.size(1)));
    const torch::Tensor before = wide.clone();
    CHECK(relative_error(penalty_gradient(model, batch, penalty, ForwardDifference{}), expected) < 1e-14);
    CHECK(same_bits(wide, before));
  }
  SECTION("each of them all of it") {
    torch::Tensor twin = model->register_parameter("twin", torch::zeros_like(model->output->bias));
    twin.set_data(model->output->bias.detach());
    model->extra = twin;
    const auto values = clones(model->parameters());
    const auto memory = addresses(*model);
    // Neither can be moved alone: refused, and both are what they were.
    CHECK_THROWS_AS(step_gradient(model, batch, penalty, options_with(CentralDifference{})), microreg::ModelError);
    for (std::size_t i = 0; i < values.size(); ++i) {
      CHECK(same_bits(model->parameters()[i], values[i]));
    }
    CHECK(addresses(*model) == memory);
  }
}

TEST_CASE("the automatic step goes by the type of the parameters", "[estimator]") {
  torch::manual_seed(4);
  torch::nn::Sequential network = random_relu_network(false, torch::kFloat32);
  const networks::Samples batch{torch::randn({16, 2, 8, 8}), torch::randint(networks::classes, {16})};
  const auto loss = [](const torch::Tensor& output, const torch::Tensor& y) {
    return torch::cross_entropy_loss(output.to(torch::kFloat64), y);
  };
  const auto gradient = [&](const microreg::Estimator& estimator, double strength) {
    clear_grad(network->parameters());
    microreg::Regularizer regularizer(network, loss, microreg::GradientNorm{}, options_with(estimator, strength));
    (void)regularizer.backward(batch.input, batch.target);
    return flat_grad(network->parameters());
  };
  const torch::Tensor plain = gradient(Exact{}, 0.0);
  const torch::Tensor exact = gradient(Exact{}, 1.0) - plain;
  CHECK(relative_error(gradient(ForwardDifference{}, 1.0) - plain, exact) < 0.005);
}

TEST_CASE("at strength 0 a difference makes no further pass", "[estimator]") {
  torch::manual_seed(9);
  Watched model;
  const auto batch = networks::vectors(8);
  const auto gradient = step_gradient(model, batch, everything, options_with(ForwardDifference{}, 0.0));
  CHECK(model->calls == 2);
  CHECK(relative_error(gradient, step_gradient(model, batch, everything, options_with(Exact{}, 0.0))) < 1e-14);
}

TEST_CASE("an estimator is assigned as a whole", "[estimator]") {
  // What a variant has beside that would leave behind what makes a difference.
  const auto emplaces = []<class E>(E& e) {
    return requires { e.template emplace<microreg::ForwardDifference>(); } || requires { e.template emplace<1>(); };
  };
  const auto swaps = []<class E>(E& e) { return requires { e.swap(e); }; };
  microreg::Estimator a = microreg::ForwardDifference{}, b = microreg::Exact{};
  CHECK_FALSE(emplaces(a));
  CHECK_FALSE(swaps(a));
  std::swap(a, b);
  CHECK(a.differences() == nullptr);
  CHECK(b.differences() != nullptr);
  CHECK(std::holds_alternative<microreg::ForwardDifference>(b));
}

TEST_CASE("options of the estimators are checked", "[estimator]") {
  const auto message = [](const microreg::RegularizerOptions& options) {
    return message_of<microreg::OptionError>([&] {
      microreg::Regularizer regularizer(networks::seeded_mlp(), cross_entropy, microreg::GradientNorm{}, options);
    });
  };
  CHECK(has(message({.estimator = ForwardDifference{-1e-3}}), {"estimator.step", "-0.001", "positive"}));
  CHECK(has(message({.estimator = CentralDifference{std::numeric_limits<double>::infinity()}}),
            {"estimator.step", "inf", "finite"}));
  CHECK(has(message({.estimator = ForwardDifference{.check_every = -1}}), {"estimator.check_every", "-1", "steps"}));
  CHECK(has(message({.estimator = CentralDifference{.tolerance = std::nan("")}}), {"estimator.tolerance", "nan"}));

  auto coarse = networks::seeded_mlp();
  coarse->to(torch::kBFloat16);
  auto batch = networks::vectors(4);
  microreg::Regularizer regularizer(coarse, cross_entropy, microreg::GradientNorm{}, options_with(ForwardDifference{}));
  CHECK(has(message_of<microreg::OptionError>(
                [&] { (void)regularizer.backward(batch.input.to(torch::kBFloat16), batch.target); }),
            {"estimator.step", "BFloat16", "Exact"}));
}

TEST_CASE("a difference refuses parameters on one memory and inputs with a graph, and has moved nothing",
          "[estimator]") {
  torch::manual_seed(31);
  torch::nn::Linear first(6, 6);
  torch::nn::Linear second(6, 6);
  second->weight.set_data(first->weight);
  const auto forward = [&](const torch::Tensor& x) { return second(first(x).tanh()); };
  const torch::Tensor before = first->weight.detach().clone();
  const auto step = [&](const torch::Tensor& x, const microreg::Estimator& estimator) {
    microreg::Regularizer regularizer(microreg::FunctionModel{forward, microreg::modules(first, second)}, cross_entropy,
                                      microreg::GradientNorm{}, {.estimator = estimator});
    (void)regularizer.backward(x, torch::zeros({4}, torch::kInt64));
  };
  const torch::Tensor x = torch::randn({4, 6});
  CHECK(has(message_of<microreg::ModelError>([&] { step(x, ForwardDifference{}); }),
            {"modules[0].weight", "modules[1].weight", "share memory", "Exact"}));
  CHECK(same_bits(first->weight.detach(), before));
  CHECK_NOTHROW(step(x, Exact{}));

  second->weight.set_data(torch::randn({6, 6}));
  const torch::Tensor outside = torch::ones({6}).requires_grad_(true);
  CHECK(has(message_of<microreg::ModelError>([&] { step(x + outside, ForwardDifference{}); }),
            {"input", "graph", "detach()"}));
}

TEST_CASE("an expanded leaf as parameter is refused by a difference", "[estimator]") {
  torch::manual_seed(32);
  const torch::Tensor w = torch::randn({1, 3}, torch::kFloat64).expand({3, 3}).detach().requires_grad_();
  const torch::Tensor before = w.detach().clone();
  const torch::Tensor x = torch::randn({8, 3}, torch::kFloat64), y = torch::randint(3, {8});
  const auto step = [&](const microreg::Estimator& estimator) {
    microreg::FunctionModel model{[&](const torch::Tensor& in) { return in.matmul(w).tanh(); }, {w}};
    microreg::Regularizer regularizer(model, cross_entropy, microreg::GradientNorm{}, {.estimator = estimator});
    (void)regularizer.backward(x, y);
  };
  for (const microreg::Estimator& estimator :
       {microreg::Estimator(ForwardDifference{}), microreg::Estimator(microreg::CentralDifference{})}) {
    CHECK(has(message_of<microreg::ModelError>([&] { step(estimator); }), {"parameters[0]", "[3, 3]", "expanded"}));
    CHECK(same_bits(w.detach(), before));
    CHECK_FALSE(w.grad().defined());
  }
  CHECK_NOTHROW(step(Exact{}));
}
