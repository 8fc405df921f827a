// The code of README.md and docs/*.md: check_docs.cmake sees to it that every block there stands here, or in an
// example, word for word. So this file is what proves that the documentation compiles, and that it does what it says.
#include "catch.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <microreg/format.hpp>
#include <microreg/microreg.hpp>

#if defined(MICROREG_WITH_CUDA)
#include <microreg/cuda_graph.hpp>
#endif

#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

namespace {

torch::Tensor images(std::int64_t count = 256) { return torch::randn({count, 6}); }
torch::Tensor labels(std::int64_t count = 256) { return torch::randint(3, {count}); }
torch::nn::Sequential small_network() {
  return torch::nn::Sequential(torch::nn::Linear(6, 8), torch::nn::Tanh(), torch::nn::Linear(8, 3));
}

double number(const torch::Tensor& scalar) { return scalar.item<double>(); }

/// The squared norm of a column of a linear layer's mean Jacobian: (mean x, 1).
double mean_input_and_bias(const torch::Tensor& x) { return number(x.mean(0).square().sum()) + 1; }

struct Sentences {
  torch::Tensor tokens, mask;
};
auto microreg_fields(Sentences& s) { return std::tie(s.tokens, s.mask); }

struct BagOfWords : torch::nn::Module {
  BagOfWords() { embedding = register_module("embedding", torch::nn::Embedding(10, 3)); }
  torch::Tensor forward(const Sentences& s) {
    const torch::Tensor mask = s.mask.unsqueeze(2);
    return (embedding->forward(s.tokens) * mask).sum(1) / mask.sum(1);
  }
  torch::nn::Embedding embedding{nullptr};
};

/// The squared Frobenius norm of the Jacobian of the mean probabilities: one probe per class.
struct ProbabilityJacobian {
  std::string_view name() const { return "probability_jacobian"; }

  template <class Pass>
  std::vector<torch::Tensor> probes(const Pass& pass) const {
    return pass.output.softmax(1).mean(0).unbind();
  }
};

/// The squared gradient norm of the mean confidence in the true class.
struct Confidence {
  std::string_view name() const { return "confidence"; }

  template <class Pass>
  torch::Tensor probe(const Pass& pass) const {
    return pass.output.softmax(1).gather(1, pass.target.unsqueeze(1)).mean();
  }
};

}  // namespace

TEST_CASE("docs: the Regularizer and the functor give the same gradient", "[docs]") {
  auto model = small_network();
  model->to(torch::kDouble);
  torch::optim::SGD optimizer(model->parameters(), 0.1);
  const auto images = ::images(100).to(torch::kDouble);
  const auto labels = ::labels(100);

  microreg::Regularizer regularizer(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{},
                                    {.strength = 0.01, .micro_batch_size = 128});
  optimizer.zero_grad();
  auto report = regularizer.backward(images, labels);
  std::vector<torch::Tensor> from_regularizer;
  for (const auto& parameter : model->parameters()) {
    from_regularizer.push_back(parameter.grad().clone());
  }

  optimizer.zero_grad();
  torch::nn::CrossEntropyLoss criterion;
  const auto &x = images, &y = labels;
  auto loss = criterion(model->forward(x), y);
  auto penalty = microreg::GradientNorm{}(loss, model->parameters());
  (loss + 0.01 * penalty).backward();
  for (std::size_t i = 0; i < from_regularizer.size(); ++i) {
    CHECK(torch::allclose(model->parameters()[i].grad(), from_regularizer[i], 1e-12, 1e-14));
  }
  CHECK(number(report.objective()) == Approx(number(loss + 0.01 * penalty)).epsilon(1e-12));
}

TEST_CASE("docs: three lines in a loop", "[docs]") {
  auto model = small_network();
  torch::optim::SGD optimizer(model->parameters(), 0.1);
  const auto images = ::images();
  const auto labels = ::labels();
  const torch::Tensor before = model->parameters().front().detach().clone();

  microreg::Regularizer regularizer(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{},
                                    {.strength = 0.01, .micro_batch_size = 128});
  optimizer.zero_grad();
  auto report = regularizer.backward(images, labels);
  optimizer.step();

  CHECK(report.micro_batches() == 2);
  CHECK_FALSE(torch::equal(before, model->parameters().front()));

  fmt::print("{}\n", report);
  double loss = report.loss.item<double>();
  double norm = report.penalty("gradient_norm").micro_batch_norms.mean().item<double>();

  CHECK(loss > 0);
  CHECK(norm > 0);
  CHECK_THROWS_AS(report.penalty("fisher_trace"), microreg::OptionError);
}

TEST_CASE("docs: several penalties and schedules", "[docs]") {
  auto model = small_network();
  const auto images = ::images();
  const auto labels = ::labels();

  microreg::Regularizer regularizer(model, torch::nn::CrossEntropyLoss(),
                                    0.01 * microreg::GradientNorm{} + 1e-3 * microreg::UnitJacobian{},
                                    {.strength = microreg::LinearWarmUp{.peak = 1.0, .steps = 500}});
  CHECK(regularizer.backward(images, labels).penalties[0].strength == 0);
  regularizer.set_step(250);
  const auto report = regularizer.backward(images, labels);
  CHECK(report.penalties[0].strength == Approx(0.005));
  CHECK(report.penalties[1].strength == Approx(0.0005));

  auto late = [](std::int64_t step) { return step < 1000 ? 0.0 : 0.01; };
  auto penalty = late * microreg::GradientNorm{} + 1e-3 * microreg::UnitJacobian{};
  microreg::Regularizer second(model, torch::nn::CrossEntropyLoss(), penalty);
  CHECK(second.backward(images, labels).penalties[0].strength == 0);
  second.set_step(1000);
  CHECK(second.backward(images, labels).penalties[0].strength == 0.01);
}

TEST_CASE("docs: a penalty chosen at run time", "[docs]") {
  auto model = small_network();
  torch::nn::CrossEntropyLoss criterion;
  const auto images = ::images();
  const auto labels = ::labels();
  for (const std::string name : {"gradient-norm", "fisher-trace"}) {
    microreg::AnyPenalty<> penalty = microreg::GradientNorm{};
    if (name == "fisher-trace") {
      penalty = 0.1 * microreg::FisherTrace{};
    }
    microreg::Regularizer<> regularizer(model, criterion, penalty);
    CHECK(regularizer.backward(images, labels).penalties[0].strength == (name == "fisher-trace" ? 0.1 : 1));
  }
}

TEST_CASE("docs: Penalised in a loop of one's own", "[docs]") {
  auto model = small_network();
  torch::nn::CrossEntropyLoss criterion;
  const auto images = ::images(64);
  const auto labels = ::labels(64);

  microreg::Penalised penalised(model->parameters(), microreg::GradientNorm{}, {.strength = 0.01});
  auto loss = criterion(model->forward(images), labels);
  auto report = penalised.backward(loss);  // instead of loss.backward()
  CHECK(number(report.loss) == Approx(number(loss)));

  for (auto [part, x, y] : microreg::micro_batches(16, images, labels)) {
    penalised.backward(part, criterion(model->forward(x), y));
  }
  CHECK(penalised.step() == 2);

  auto encoder = torch::nn::Linear(6, 8);
  auto decoder = torch::nn::Linear(8, 3);
  microreg::Penalised both(microreg::modules(encoder, decoder), microreg::AverageJacobian{},
                           {.strength = 0.001, .estimator = microreg::ForwardDifference{}});
  both.backward([&] {
    auto output = decoder->forward(encoder->forward(images));
    return std::pair{criterion(output, labels), output};
  });
  CHECK(encoder->weight.grad().defined());
}

TEST_CASE("docs: several modules as one model", "[docs]") {
  auto encoder = torch::nn::Linear(6, 8);
  auto decoder = torch::nn::Linear(8, 3);

  microreg::FunctionModel model{[&](const torch::Tensor& x) { return decoder->forward(encoder->forward(x)); },
                                microreg::modules(encoder, decoder)};
  microreg::Regularizer regularizer(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{});
  regularizer.backward(images(), labels());
  CHECK(encoder->weight.grad().defined());
}

TEST_CASE("docs: selection and generator", "[docs]") {
  if (skipped_off_the_cpu("a generator of the CPU's")) {
    return;
  }
  auto model = small_network();
  torch::nn::CrossEntropyLoss criterion;
  const auto images = ::images();
  const auto labels = ::labels();

  microreg::RegularizerOptions options;
  options.select = [](const std::string&, const at::Tensor& p) { return p.dim() > 1; };  // no biases, no norms
  options.generator = at::make_generator<at::CPUGeneratorImpl>(/*seed=*/7);
  microreg::Regularizer regularizer(model, criterion, microreg::FisherTrace{}, options);

  const auto first = regularizer.backward(images, labels);
  options.generator = at::make_generator<at::CPUGeneratorImpl>(7);
  microreg::Regularizer again(model, criterion, microreg::FisherTrace{}, options);
  CHECK(torch::equal(first.penalties[0].value, again.backward(images, labels).penalties[0].value));

  options.strength = microreg::LinearWarmUp{.peak = 0.01, .steps = 500};
  CHECK(options.strength.at(250) == Approx(0.005));
  microreg::Strength constant = 0.01;
  microreg::Strength schedule = [](std::int64_t step) { return step < 100 ? 0.0 : 0.01; };
  CHECK(constant.at(3) == schedule.at(100));
}

TEST_CASE("docs: measure", "[docs]") {
  auto model = small_network();
  const auto images = ::images();
  const auto labels = ::labels();

  auto report = microreg::measure(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{}, images, labels,
                                  {.micro_batch_size = 128});
  double squared_norm = report.penalties[0].value.item<double>();

  CHECK(squared_norm == Approx(number(report.penalties[0].micro_batch_norms.square().mean())));
  CHECK_FALSE(model->parameters().front().grad().defined());
}

TEST_CASE("docs: a plain function is a model", "[docs]") {
  auto w = torch::randn({6, 3}, torch::requires_grad());
  auto b = torch::zeros({3}, torch::requires_grad());

  microreg::FunctionModel model{[&](const torch::Tensor& x) { return torch::addmm(b, x, w); }, {w, b}};
  auto loss = [](const torch::Tensor& output, const torch::Tensor& target) {
    return torch::nn::functional::mse_loss(output, target);
  };
  microreg::Regularizer regularizer(model, loss, microreg::GradientNorm{});

  regularizer.backward(images(), torch::randn({256, 3}));
  CHECK(b.grad().abs().sum().item<double>() > 0);
}

TEST_CASE("docs: a batch of one's own", "[docs]") {
  BagOfWords model;
  const Sentences sentences{torch::randint(10, {20, 5}), torch::ones({20, 5})};
  microreg::Regularizer regularizer(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{},
                                    {.micro_batch_size = 8});
  const auto report = regularizer.backward(sentences, labels(20));
  CHECK(report.micro_batches() == 3);
  CHECK(report.samples == 20);
}

TEST_CASE("docs: errors", "[docs]") {
  auto model = small_network();
  torch::nn::CrossEntropyLoss criterion;
  const auto images = ::images(256);
  const auto labels = ::labels(255);
  microreg::Regularizer regularizer(model, criterion, microreg::GradientNorm{});
  std::string what;
  auto log = [&](const char* message) { what = message; };

  try {
    regularizer.backward(images, labels);
  } catch (const microreg::Error& error) {
    log(error.what());  // model, buffers, .grad, random numbers and step() are what they were
  }

  CHECK(what ==
        "first dimensions differ: input has 256 samples, target has 255; pass the inputs and targets of the same "
        "samples");
  CHECK(regularizer.step() == 0);
  CHECK_FALSE(model->parameters().front().grad().defined());
}

TEST_CASE("docs: Fisher trace", "[docs]") {
  auto model = small_network();
  torch::nn::CrossEntropyLoss criterion;
  const auto images = ::images();
  const auto labels = ::labels();

  microreg::Regularizer regularizer(model, criterion, microreg::FisherTrace{},
                                    {.strength = 0.01, .micro_batch_size = 128});
  auto report = regularizer.backward(images, labels);
  CHECK(number(report.penalty("fisher_trace").value) > 0);

  microreg::FisherTrace averaged{.draws = 2};
  microreg::FisherTrace expected{.expectation = microreg::Expectation::exact};
  CHECK(averaged.draws == 2);
  CHECK(number(expected(model->forward(images.narrow(0, 0, 4)), model->parameters())) > 0);

  microreg::FisherTrace regression{microreg::Gaussian{.standard_deviation = 0.5}};
  CHECK(number(regression(model->forward(images), model->parameters())) > 0);

  const auto& x = images;
  {
    microreg::FisherTrace<microreg::Bernoulli> penalty;
    auto value = penalty(model->forward(x), model->parameters());
    CHECK(value.requires_grad());
  }
  {
    microreg::FisherTrace penalty{microreg::Distribution{
        [](const torch::Tensor& log_rate, auto generator) { return torch::poisson(log_rate.exp(), generator); },
        [](const torch::Tensor& log_rate, const torch::Tensor& y) { return (log_rate.exp() - y * log_rate).mean(); }}};
    CHECK(number(penalty(model->forward(x), model->parameters())) > 0);
  }
}

TEST_CASE("docs: Jacobians", "[docs]") {
  // For one linear layer every row of J-bar is (mean x, 1) on its own class, so all three penalties are known.
  torch::nn::Linear model(6, 3);
  const auto x = images();
  const double row = mean_input_and_bias(x);
  {
    auto value = microreg::AverageJacobian{}(model->forward(x), model->parameters());
    CHECK(number(value) == Approx(3 * row).epsilon(1e-4));
  }
  {
    auto value = microreg::UnitJacobian{}(model->forward(x), model->parameters());
    CHECK(number(value) == Approx(row).epsilon(1e-4));
  }
  {
    const auto labels = ::labels();
    auto report = microreg::measure(model, torch::nn::CrossEntropyLoss(),
                                    microreg::AverageJacobian{} + microreg::UnitJacobian{} + microreg::JacobianNorm{},
                                    x, labels, {.micro_batch_size = 256});
    CHECK(number(report.penalty("average_jacobian").value) == Approx(3 * row).epsilon(1e-4));
    CHECK(number(report.penalty("unit_jacobian").value) == Approx(row).epsilon(1e-4));
    CHECK(number(report.penalty("jacobian_norm").value) == Approx(3 * row).epsilon(1e-4));
  }
  const auto images = ::images();
  const auto labels = ::labels();
  auto network = small_network();
  {
    microreg::Regularizer regularizer(network, torch::nn::CrossEntropyLoss(), microreg::AverageJacobian{},
                                      {.strength = 0.001, .micro_batch_size = 128});
    auto report = regularizer.backward(images, labels);
    CHECK(number(report.penalty("average_jacobian").value) > 0);
  }
  {
    microreg::Regularizer regularizer(network, torch::nn::CrossEntropyLoss(), microreg::UnitJacobian{},
                                      {.strength = 0.001, .micro_batch_size = 128});
    auto report = regularizer.backward(images, labels);
    CHECK(number(report.penalty("unit_jacobian").value) > 0);
  }
}

TEST_CASE("docs: a penalty of one's own", "[docs]") {
  auto model = small_network();
  torch::nn::CrossEntropyLoss criterion;
  const auto images = ::images();
  const auto labels = ::labels();

  microreg::SquaredGradientNorm penalty{[](const torch::Tensor& output) { return output.logsumexp(1).mean(); }};
  microreg::Regularizer regularizer(model, criterion, penalty, {.strength = 0.01, .micro_batch_size = 256});
  auto report = regularizer.backward(images, labels);
  CHECK(report.penalties[0].name == "custom");

  // The same penalty in the functor form.
  auto value = penalty(model->forward(images), model->parameters());
  CHECK(number(report.penalties[0].value) == Approx(number(value)));

  microreg::SquaredGradientNorm with_target{[](const torch::Tensor& output, const torch::Tensor& y) {
                                              return torch::mse_loss(output.softmax(1).select(1, 0), y);
                                            },
                                            "brier"};
  const auto y = torch::rand({256});
  auto mse = [](const torch::Tensor& output, const torch::Tensor& target) {
    return (output.sum(1) - target).square().mean();
  };
  CHECK(microreg::measure(model, mse, with_target, images, y).penalties[0].name == "brier");

  microreg::SquaredGradientNorm squared_loss{[](const auto& pass) { return pass.loss.square(); }, "squared_loss"};
  CHECK(number(microreg::measure(model, criterion, squared_loss, images, labels).penalties[0].value) > 0);

  CHECK(number(microreg::measure(model, criterion, ProbabilityJacobian{}, images, labels).penalties[0].value) > 0);

  auto sum = microreg::Weighted{0.1, Confidence{}} + 1e-3 * microreg::GradientNorm{};
  const auto both = microreg::measure(model, criterion, sum, images, labels);
  CHECK(both.penalty("confidence").strength == 0.1);
  CHECK(number(both.penalty("confidence").value) > 0);
}

TEST_CASE("docs: Jacobians beyond the paper, and the unsquared norm", "[docs]") {
  torch::nn::Linear model(6, 3);
  auto network = small_network();
  torch::nn::CrossEntropyLoss criterion;
  const auto images = ::images();
  const auto labels = ::labels();
  {
    const auto& x = images;
    auto value = microreg::JacobianNorm{}(model->forward(x), model->parameters());
    CHECK(number(value) == Approx(3 * mean_input_and_bias(x)).epsilon(1e-4));
    microreg::UnitJacobian several{.directions = 4, .scale_by_outputs = true};
    CHECK(number(several(model->forward(x), model->parameters())) == Approx(number(value)).epsilon(1e-4));
  }
  {
    auto x = images.clone().requires_grad_(true);
    auto value = microreg::InputJacobian{}(model->forward(x), {x});
    CHECK(value.requires_grad());
  }
  {
    microreg::Regularizer regularizer(network, torch::nn::CrossEntropyLoss(), microreg::JacobianNorm{},
                                      {.strength = 0.001, .micro_batch_size = 128});
    auto report = regularizer.backward(images, labels);
    CHECK(number(report.penalty("jacobian_norm").value) > 0);
  }
  {
    microreg::Regularizer regularizer(network, torch::nn::CrossEntropyLoss(), microreg::InputJacobian{},
                                      {.strength = 0.01, .micro_batch_size = 128});
    auto report = regularizer.backward(images, labels);
    CHECK(number(report.penalty("input_jacobian").value) > 0);
  }
  {
    microreg::Unsquared penalty{microreg::GradientNorm{}};
    microreg::Regularizer regularizer(model, criterion, penalty, {.strength = 0.1, .micro_batch_size = 128});
    auto report = regularizer.backward(images, labels);
    CHECK(number(report.penalty("unsquared_gradient_norm").value) > 0);
  }
}

TEST_CASE("docs: estimators", "[docs]") {
  auto model = small_network();
  const auto images = ::images();
  const auto labels = ::labels();

  microreg::Regularizer regularizer(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{},
                                    {.strength = 0.01, .estimator = microreg::ForwardDifference{}});
  auto report = regularizer.backward(images, labels);
  CHECK(report.penalised.size() == 2);

  microreg::RegularizerOptions options{.strength = 0.01, .micro_batch_size = 32, .sampling = {.share = 0.25}};
  options.estimator = microreg::ForwardDifference{.step = 0.01, .gates = microreg::Gates::free};
  microreg::Regularizer shared(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{}, options);
  CHECK(shared.backward(images, labels).penalised.size() == 2);
}

TEST_CASE("docs: hooks on parameters see the passes, not the sum", "[docs]") {
  auto model = small_network();
  int calls = 0;
  model->parameters().front().register_hook([&](const torch::Tensor&) { ++calls; });
  microreg::Regularizer regularizer(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{},
                                    {.micro_batch_size = 128});
  regularizer.backward(images(), labels());
  CHECK(calls == 4);  // two micro-batches, two passes each
}

TEST_CASE("docs: accumulation is in place", "[docs]") {
  auto model = small_network();
  microreg::Regularizer regularizer(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{});
  regularizer.backward(images(), labels());
  const torch::Tensor grad = model->parameters().front().grad();
  const torch::Tensor before = grad.clone();
  regularizer.backward(images(), labels());
  CHECK(model->parameters().front().grad().is_same(grad));
  CHECK_FALSE(torch::equal(grad, before));
}

TEST_CASE("docs: batch normalisation moves once per micro-batch", "[docs]") {
  torch::nn::Sequential model(torch::nn::Linear(6, 8), torch::nn::BatchNorm1d(8), torch::nn::Linear(8, 3));
  microreg::Regularizer regularizer(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{},
                                    {.micro_batch_size = 64});
  const auto tracked = [&] { return model->named_buffers()["1.num_batches_tracked"].item<std::int64_t>(); };
  regularizer.backward(images(), labels());
  CHECK(tracked() == 4);
  const auto report =
      microreg::measure(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{}, images(), labels());
  CHECK(report.samples == 256);
  CHECK(tracked() == 4);
}

TEST_CASE("docs: a fused scope around the functor", "[docs]") {
  auto model = small_network();
  const torch::Tensor x = images();
  const torch::Tensor y = labels();

  const microreg::FusedScope fused;
  auto loss = torch::nn::functional::cross_entropy(model->forward(x), y);
  (loss + 0.01 * microreg::GradientNorm{}(loss, model->parameters())).backward();

  CHECK(model->parameters()[0].grad().defined());
}

TEST_CASE("docs: grafting", "[docs]") {
  const torch::Tensor images = ::images(64);
  const torch::Tensor labels = ::labels(64);
  auto model = small_network();
  torch::optim::SGD optimizer(model->parameters(), 0.1);
  microreg::Regularizer regularizer(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{},
                                    {.strength = 0, .micro_batch_size = 16});
  const auto length_of_step = [&](const std::vector<torch::Tensor>& before) {
    double sum = 0;
    for (std::size_t i = 0; i < before.size(); ++i) {
      sum += number((model->parameters()[i].detach() - before[i]).square().sum());
    }
    return std::sqrt(sum);
  };
  const auto weights = [&] {
    std::vector<torch::Tensor> copies;
    for (const torch::Tensor& parameter : model->parameters()) {
      copies.push_back(parameter.detach().clone());
    }
    return copies;
  };
  auto before = weights();
  auto report = regularizer.backward(images, labels);  // GradientNorm with strength 0: measured, not penalised
  microreg::graft(model->parameters(), report.penalties[0].micro_batch_norms[0]);
  optimizer.step();
  CHECK(length_of_step(before) == Approx(0.1 * number(report.penalties[0].micro_batch_norms[0])).epsilon(1e-4));
  before = weights();
  microreg::graft(model->parameters(), 1.0);  // the learning rate becomes the length of the step
  optimizer.step();
  CHECK(length_of_step(before) == Approx(0.1).epsilon(1e-4));
}

TEST_CASE("options.hpp, docs/concepts.md: a loss that says what it is a mean over", "[docs]") {
  auto loss = [](const torch::Tensor& o, const torch::Tensor& y) {
    return microreg::CountedLoss{torch::nll_loss(o, y, {}, at::Reduction::Sum, -100), (y != -100).sum()};
  };
  const torch::Tensor w = torch::randn({6, 3}, torch::requires_grad());
  microreg::FunctionModel model{[&](const torch::Tensor& x) { return torch::log_softmax(x.matmul(w), 1); }, {w}};
  torch::Tensor y = labels();
  y.narrow(0, 0, 200).fill_(-100);
  const torch::Tensor x = images();
  microreg::Regularizer regularizer(model, loss, microreg::GradientNorm{});
  const auto report = regularizer.backward(x, y);
  CHECK(number(report.loss) == Approx(number(torch::nll_loss(torch::log_softmax(x.matmul(w), 1), y))).epsilon(1e-5));
}

TEST_CASE("docs: mixed precision", "[docs]") {
  if (skipped_off_the_cpu("the CPU's Autocast")) {
    return;
  }
  auto model = small_network();
  const auto images = ::images();
  const auto labels = ::labels();

  const torch::Tensor output = [&] {
    const microreg::Autocast half(torch::kCPU, torch::kBFloat16);
    return model->forward(images);
  }();
  CHECK(output.scalar_type() == torch::kBFloat16);

  microreg::Regularizer regularizer(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{},
                                    {.strength = 0.01, .micro_batch_size = 32, .autocast = torch::kBFloat16});
  regularizer.backward(images, labels);
  for (const torch::Tensor& parameter : model->parameters()) {
    CHECK(parameter.grad().scalar_type() == torch::kFloat32);
  }
}

TEST_CASE("docs: a loss scale that follows the gradients", "[docs]") {
  auto model = small_network();
  const auto images = ::images();
  const auto labels = ::labels();
  torch::optim::SGD optimizer(model->parameters(), 0.1);

  microreg::Regularizer regularizer(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{},
                                    {.strength = 0.01,
                                     .micro_batch_size = 32,
                                     .autocast = torch::kHalf,
                                     .loss_scale = microreg::DynamicLossScale{.start = 65536, .interval = 2000}});
  optimizer.zero_grad();
  if (!regularizer.backward(images, labels).skipped) {
    optimizer.step();
  }
  CHECK(regularizer.loss_scale().defined());
}

TEST_CASE("docs: micro-batches side by side", "[docs][threads]") {
  auto model = small_network();

  microreg::Regularizer regularizer(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{},
                                    {.strength = 0.01, .micro_batch_size = 32, .workers = 2});
  CHECK(regularizer.backward(::images(), ::labels()).micro_batches() > 1);
}

#if defined(MICROREG_WITH_CUDA)
TEST_CASE("docs: CUDA graphs", "[docs]") {
  if (!torch::cuda::is_available()) {
    return;
  }
  auto model = small_network();
  model->to(torch::kCUDA);

  microreg::Regularizer regularizer(
      model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{},
      {.strength = 0.01, .micro_batch_size = 32, .cuda_graph = std::make_shared<microreg::CudaGraph>()});
  for (int step = 0; step < 3; ++step) {
    model->zero_grad();
    (void)regularizer.backward(::images().cuda(), ::labels().cuda());
  }
}
#endif
