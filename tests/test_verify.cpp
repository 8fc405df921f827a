// verify: what it says of networks of every kind, and that it leaves no trace.
#include "helpers.hpp"
#include "networks.hpp"
#include "own_functions.hpp"

#include <microreg/format.hpp>
#include <microreg/microreg.hpp>
#include <microreg/verify.hpp>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

using namespace helpers;
using torch::Tensor;

namespace {

using Forward = std::function<Tensor(const Tensor&)>;

bool any_has(const std::vector<std::string>& sentences, std::initializer_list<const char*> parts) {
  for (const std::string& sentence : sentences) {
    if (std::all_of(parts.begin(), parts.end(),
                    [&](const char* part) { return sentence.find(part) != std::string::npos; })) {
      return true;
    }
    UNSCOPED_INFO("there is: " << sentence);
  }
  return false;
}

const microreg::ParameterUse& use_of(const microreg::Verification& found, const std::string& name) {
  for (const microreg::ParameterUse& use : found.parameters) {
    if (use.name == name) {
      return use;
    }
  }
  FAIL("no parameter " << name);
  return found.parameters.front();
}

/// Weights of 6-8-5 networks on 12 samples in micro-batches of 4.
struct Setting {
  Tensor a, b, x, y;
  explicit Setting(torch::ScalarType type = torch::kFloat64) {
    torch::manual_seed(4);
    a = (torch::randn({6, 8}, torch::kFloat64) * 0.5).to(type).requires_grad_();
    b = (torch::randn({8, 5}, torch::kFloat64) * 0.5).to(type).requires_grad_();
    x = torch::randn({12, 6}, torch::kFloat64).to(type);
    y = torch::randint(5, {12});
  }

  [[nodiscard]] microreg::Verification verified(const Forward& forward, microreg::RegularizerOptions options = {},
                                                const std::vector<Tensor>& more = {}) const {
    std::vector<Tensor> parameters{a, b};
    parameters.insert(parameters.end(), more.begin(), more.end());
    options.micro_batch_size = 4;
    auto found = microreg::verify(microreg::FunctionModel<Forward>{forward, parameters}, cross_entropy,
                                  microreg::GradientNorm{}, x, y, options);
    UNSCOPED_INFO(found.text());
    for (const Tensor& parameter : parameters) {
      CHECK_FALSE(parameter.grad().defined());
    }
    return found;
  }
};

/// A backward pass without a graph.
struct NoGraph : torch::autograd::Function<NoGraph> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& x) {
    context->save_for_backward({x});
    return x.sin();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list upstream) {
    const at::NoGradGuard no_grad;
    return {upstream[0] * context->get_saved_variables()[0].cos()};
  }
};

/// The penalty's gradient by hand, on the first four samples.
std::vector<Tensor> by_hand(const Setting& s, const Forward& forward) {
  const Tensor loss = torch::cross_entropy_loss(forward(s.x.narrow(0, 0, 4)), s.y.narrow(0, 0, 4));
  const auto g = torch::autograd::grad({loss}, {s.a, s.b}, {}, true, true);
  return torch::autograd::grad({g[0].square().sum() + g[1].square().sum()}, {s.a, s.b});
}
double norm_of(const std::vector<Tensor>& tensors) {
  double squared = 0;
  for (const Tensor& tensor : tensors) {
    squared += tensor.square().sum().item<double>();
  }
  return std::sqrt(squared);
}

/// Batch normalisation, dropout, a hidden layer that nobody uses, a frozen one.
struct EverythingImpl : torch::nn::Module {
  EverythingImpl() {
    register_module("first", first);
    register_module("norm", norm);
    register_module("dropout", dropout);
    register_module("unused", unused);
    register_module("frozen", frozen);
    register_module("last", last);
    frozen->weight.requires_grad_(false);
    frozen->bias.requires_grad_(false);
  }
  Tensor forward(const Tensor& x) {
    if (throws_at > 0 && ++calls == throws_at) {
      throw std::domain_error("the model throws");
    }
    return last(dropout(torch::relu(frozen(norm(first(x))))));
  }
  torch::nn::Linear first{6, 8};
  torch::nn::BatchNorm1d norm{8};
  torch::nn::Dropout dropout{0.3};
  torch::nn::Linear unused{3, 3};
  torch::nn::Linear frozen{8, 8};
  torch::nn::Linear last{8, 5};
  int throws_at = 0;
  int calls = 0;
};
TORCH_MODULE(Everything);

}  // namespace

TEST_CASE("verify: a network that nothing is wrong with", "[verify]") {
  const auto type = GENERATE(torch::kFloat64, torch::kFloat32);
  const Setting s(type);
  const Forward forward = [&](const Tensor& x) { return torch::matmul(torch::relu(torch::matmul(x, s.a)), s.b); };
  const auto found = s.verified(forward, {.strength = 0.5});
  const bool fine = type == torch::kFloat64;
  CHECK(found.ok());
  CHECK(found.notes.empty());
  CHECK(found.samples == 12);
  CHECK(found.micro_batches == 3);
  CHECK(found.micro_batch_samples == 4);
  CHECK(found.exact_refusal.empty());
  CHECK(found.missing.empty());
  CHECK(found.other_refusal.empty());
  REQUIRE(found.fused_error.has_value());
  CHECK(*found.fused_error < (fine ? 1e-13 : 1e-5));
  CHECK(found.difference == "ForwardDifference");
  CHECK(found.difference_refusal.empty());
  REQUIRE(found.difference_error.has_value());
  CHECK(*found.difference_error > 0);
  CHECK(*found.difference_error < (fine ? 1e-5 : 1e-2));
  CHECK(found.not_frozen.empty());
  CHECK(found.functions.empty());
  CHECK(found.fused.contains("threshold_backward"));

  const Tensor loss = torch::cross_entropy_loss(forward(s.x.narrow(0, 0, 4)), s.y.narrow(0, 0, 4));
  const double of_loss = norm_of(torch::autograd::grad({loss}, {s.a, s.b}));
  const double of_penalty = norm_of(by_hand(s, forward));
  const double tolerance = fine ? 1e-12 : 1e-4;
  CHECK(found.loss == Approx(loss.item<double>()).epsilon(tolerance));
  CHECK(found.loss_gradient_norm == Approx(of_loss).epsilon(tolerance));
  REQUIRE(found.penalties.size() == 1);
  CHECK(found.penalties[0].name == "gradient_norm");
  CHECK(found.penalties[0].strength == 0.5);
  CHECK(found.penalties[0].value.value() == Approx(of_loss * of_loss).epsilon(tolerance));
  CHECK(found.penalties[0].gradient_norm.value() == Approx(of_penalty).epsilon(tolerance));
  CHECK(found.gradient_ratio.value() == Approx(0.5 * of_penalty / of_loss).epsilon(tolerance));
  CHECK(found.strength_for_one.value() == Approx(of_loss / of_penalty).epsilon(tolerance));
  CHECK(found.strength_for_a_tenth.value() == Approx(0.1 * of_loss / of_penalty).epsilon(tolerance));

  CHECK(found.plain.seconds > 0);
  CHECK(found.plain.peak_bytes > 0);
  REQUIRE(found.exact_cost.has_value());
  REQUIRE(found.difference_cost.has_value());
  CHECK(found.exact_cost->peak_bytes > found.plain.peak_bytes);
  CHECK(found.difference_cost->seconds > 0);

  std::ostringstream out;
  out << found;
  CHECK(out.str() == found.text());
  CHECK(fmt::format("{}", found) == found.text());
  CHECK(has(found.text(),
            {"micro-batch 0 of 3, 4 of 12 samples", "no problem", "gradient_norm", "goes through",
             "ForwardDifference against exact", "2 trained, all of which take part", "threshold_backward"}));
}

TEST_CASE("verify: the ratio is the one that a step reports", "[verify]") {
  auto model = networks::seeded_cnn(networks::Norm::none, networks::Activation::kinked);
  const auto batch = networks::images(4);
  const auto penalties = 0.1 * microreg::GradientNorm{} + 0.2 * microreg::AverageJacobian{};
  const microreg::RegularizerOptions options{.strength = 0.5, .gradient_ratio = true};
  const auto found = microreg::verify(model, cross_entropy, penalties, batch.input, batch.target, options);
  microreg::Regularizer regularizer(model, cross_entropy, penalties, options);
  const auto report = regularizer.backward(batch.input, batch.target);
  CHECK(found.ok());
  CHECK(found.gradient_ratio.value() == Approx(report.gradient_ratio.item<double>()).epsilon(1e-10));
  REQUIRE(found.penalties.size() == 2);
  for (std::size_t i = 0; i < 2; ++i) {
    CHECK(found.penalties[i].name == report.penalties[i].name);
    CHECK(found.penalties[i].strength == report.penalties[i].strength);
    CHECK(found.penalties[i].value.value() == Approx(report.penalties[i].value.item<double>()).epsilon(1e-10));
    CHECK(found.penalties[i].gradient_norm.value() > 0);
  }
  CHECK(found.fused.contains("convolution_backward"));
}

TEST_CASE("verify: batch normalisation, dropout, unused and frozen parameters", "[verify]") {
  torch::manual_seed(2);
  Everything model;
  const Tensor x = torch::randn({13, 6});
  const Tensor y = torch::randint(5, {13});
  const microreg::RegularizerOptions options{.strength = 0.1, .micro_batch_size = 4};
  auto found = microreg::verify(model, cross_entropy, microreg::GradientNorm{}, x, y, options);
  INFO(found.text());
  CHECK(any_has(found.notes, {"1 batch normalisation takes", "micro-batch of 4"}));
  CHECK(any_has(found.notes, {"1 dropout is"}));
  CHECK(any_has(found.notes, {"last micro-batch has 1 sample instead of 4"}));
  CHECK(any_has(found.problems, {"one sample", "ShortLast::merged"}));
  CHECK(found.exact_refusal.empty());
  CHECK(found.difference_refusal.empty());
  CHECK(found.fused.contains("native_batch_norm_backward"));
  CHECK(use_of(found, "frozen.weight").frozen);
  CHECK_FALSE(use_of(found, "first.weight").frozen);
  CHECK(use_of(found, "first.weight").loss);
  CHECK(use_of(found, "first.weight").penalty.value());
  CHECK_FALSE(use_of(found, "unused.weight").loss);
  CHECK_FALSE(use_of(found, "unused.weight").penalty.value());
  CHECK(has(found.text(), {"unused by the loss: unused.weight, unused.bias", "frozen: frozen.weight, frozen.bias"}));

  auto merged = options;
  merged.short_last = microreg::ShortLast::merged;
  merged.select = [](const std::string& name, const Tensor&) { return name.starts_with("last"); };
  found = microreg::verify(model, cross_entropy, microreg::GradientNorm{}, x, y, merged);
  CHECK(found.ok());
  CHECK_FALSE(use_of(found, "first.weight").selected);
  CHECK(use_of(found, "first.weight").penalty.value());
  CHECK(use_of(found, "last.weight").selected);

  model->eval();
  found = microreg::verify(model, cross_entropy, microreg::GradientNorm{}, x, y, options);
  INFO(found.text());
  CHECK(found.ok());
  CHECK_FALSE(any_has(found.notes, {"normalisation"}));
  CHECK_FALSE(any_has(found.notes, {"dropout"}));
}

TEST_CASE("verify: instance normalisation is none of the batch", "[verify]") {
  torch::manual_seed(2);
  torch::nn::Sequential model(torch::nn::Conv2d(2, 3, 3), torch::nn::InstanceNorm2d(3), torch::nn::Flatten(),
                              torch::nn::Linear(48, 5));
  const auto found = microreg::verify(model, cross_entropy, microreg::GradientNorm{}, torch::randn({4, 2, 6, 6}),
                                      torch::randint(5, {4}));
  INFO(found.text());
  CHECK_FALSE(any_has(found.notes, {"normalisation"}));
}

TEST_CASE("verify: all operations without a second derivative", "[verify]") {
  if (skipped_off_the_cpu("CUDA's attention in float64 has one")) {
    return;
  }
  const Setting s;
  const Forward forward = [&](const Tensor& x) {
    const Tensor h = torch::cdist(torch::matmul(x, s.a), torch::zeros({8, 8}, torch::kFloat64), 1.5);
    const Tensor heads = h.view({1, 1, -1, 8});
    return torch::matmul(h + torch::scaled_dot_product_attention(heads, heads, heads).view({-1, 8}), s.b);
  };
  const auto found = s.verified(forward);
  CHECK_FALSE(found.ok());
  CHECK(has(found.exact_refusal, {"no second derivative"}));
  const bool cdist_too = !microreg::detail::cdist_differentiates_twice;
  REQUIRE(found.missing.size() == (cdist_too ? 2 : 1));
  CHECK(has(found.missing.front().operation + found.missing.back().operation, {"attention"}));
  CHECK(has(found.missing.front().operation + found.missing.back().operation, {"_cdist_backward"}) == cdist_too);
  for (const auto& missing : found.missing) {
    CHECK(has(missing.place, {"behind parameter"}));
  }
  CHECK(has(found.text(), {"setSDPUseFlash(false)"}));
  CHECK(has(found.text(), {"operands, or ForwardDifference"}) == cdist_too);
  CHECK(any_has(found.problems, {"Exact is refused"}));
  CHECK_FALSE(found.fused_error.has_value());
  CHECK_FALSE(found.difference_error.has_value());
  CHECK_FALSE(found.exact_cost.has_value());

  // A difference is what does it.
  const auto by_difference = s.verified(forward, {.estimator = microreg::ForwardDifference{}});
  CHECK(by_difference.ok());
  CHECK(by_difference.gradient_ratio.value() > 0);
  CHECK(has(by_difference.text(), {"exact is not to be had"}));
}

TEST_CASE("verify: functions of one's own", "[verify]") {
  const Setting s;
  const auto kink =
      s.verified([&](const Tensor& x) { return torch::matmul(OwnKink::apply(torch::matmul(x, s.a)), s.b); });
  REQUIRE(kink.functions.size() == 1);
  CHECK(has(kink.functions[0], {"OwnKink"}));
  CHECK(kink.exact_refusal.empty());
  CHECK(kink.ok());  // with Exact

  const auto without_graph =
      s.verified([&](const Tensor& x) { return torch::matmul(NoGraph::apply(torch::matmul(x, s.a)), s.b); });
  CHECK(has(without_graph.exact_refusal, {"NoGraph", "leaves the graph"}));
  CHECK(any_has(without_graph.problems, {"NoGraph"}));
}

TEST_CASE("verify: decisions that a difference does not see", "[verify][threads]") {
  const Setting s;
  const Forward forward = [&](const Tensor& x) {
    Tensor h;
    std::thread([&] { h = torch::relu(torch::matmul(x, s.a)); }).join();
    return torch::matmul(h, s.b);
  };
  const auto exact = s.verified(forward);
  CHECK(exact.ok());
  CHECK(exact.not_frozen == std::vector<std::string>{"ReluBackward0"});
  CHECK(has(exact.difference_refusal, {"ReluBackward0", "cannot be frozen"}));
  const auto difference = s.verified(forward, {.estimator = microreg::CentralDifference{}});
  CHECK(difference.difference == "CentralDifference");
  CHECK(any_has(difference.problems, {"CentralDifference is refused", "cannot be frozen"}));

  const auto refused =
      s.verified([&](const Tensor& x) { return torch::matmul(torch::renorm(torch::matmul(x, s.a), 2, 0, 0.5), s.b); });
  CHECK(any_has(refused.not_frozen, {"renorm"}));
}

TEST_CASE("verify: noise of one's own, and state", "[verify]") {
  const Setting s;
  int calls = 0;
  const auto found = s.verified(
      [&](const Tensor& x) { return torch::matmul(torch::tanh(torch::matmul(x, s.a)), s.b) * (1 + 0.01 * ++calls); });
  CHECK(any_has(found.problems, {"made twice", "outside of its buffers"}));
  const auto drawn = s.verified(
      [&](const Tensor& x) { return torch::matmul(torch::tanh(torch::matmul(x + torch::randn_like(x), s.a)), s.b); });
  CHECK(drawn.ok());
  CHECK(any_has(drawn.notes, {"draws random numbers"}));
}

TEST_CASE("verify: a leaf that gets no gradient", "[verify]") {
  const Setting s;
  const Tensor scale = torch::ones({}, torch::kFloat64).requires_grad_();
  const Forward forward = [&](const Tensor& x) {
    return torch::matmul(torch::tanh(torch::matmul(x, s.a)), s.b) * scale;
  };
  CHECK(any_has(s.verified(forward).problems, {"no parameter of the model", "also_train"}));
  const auto trained = s.verified(forward, {.also_train = {scale}});
  CHECK(trained.ok());
  CHECK(use_of(trained, "also_train[0]").loss);
  CHECK(s.verified(forward, {.other_leaves = microreg::OtherLeaves::ignored}).ok());
}

TEST_CASE("verify: a penalty that does nothing", "[verify]") {
  const Setting s;
  const microreg::FunctionModel model{[&](const Tensor& x) { return torch::matmul(x, s.a); }, {s.a}};
  const auto linear = microreg::verify(
      model, [](const Tensor& output) { return output.mean(); }, microreg::GradientNorm{}, s.x, microreg::NoTarget{});
  INFO(linear.text());
  CHECK(any_has(linear.problems, {"gradient of the penalties is 0"}));
  CHECK_FALSE(use_of(linear, "parameters[0]").penalty.value());
  CHECK_FALSE(linear.strength_for_one.has_value());

  const microreg::SquaredGradientNorm cut{[](const Tensor& output) { return output.detach().mean(); }};
  const auto detached = microreg::verify(model, cross_entropy, cut, s.x, s.y % 8);
  CHECK(has(detached.exact_refusal, {"graph"}));
  CHECK_FALSE(detached.ok());

  const auto weak = s.verified([&](const Tensor& x) { return torch::matmul(torch::tanh(torch::matmul(x, s.a)), s.b); },
                               {.strength = 1e-7});
  CHECK(weak.ok());
  CHECK(any_has(weak.notes, {"hardly move"}));
  CHECK(weak.difference_refusal.empty());
  CHECK(weak.difference_error.value() < 1e-4);
  const auto late = s.verified([&](const Tensor& x) { return torch::matmul(torch::tanh(torch::matmul(x, s.a)), s.b); },
                               {.strength = microreg::LinearWarmUp{.peak = 0.1, .steps = 10}});
  CHECK(late.strength_assumed);
  CHECK(late.penalties[0].strength == 1);
  CHECK(any_has(late.notes, {"strength is 0 at step 0"}));
}

TEST_CASE("verify: where only the fused double backward is right", "[verify]") {
  const Setting s;
  const Tensor length = torch::ones({6, 1}, torch::kFloat64).requires_grad_();
  const Forward forward = [&](const Tensor& x) {
    return torch::matmul(torch::tanh(torch::matmul(x, at::_weight_norm(s.a, length, 0))), s.b);
  };
  const auto found = s.verified(forward, {}, {length});
  CHECK(found.ok());
  CHECK(has(found.other_refusal, {"_weight_norm"}));
  CHECK(found.difference_error.value() < 1e-5);
  const auto stock = s.verified(forward, {.fused = false}, {length});
  CHECK(has(stock.exact_refusal, {"_weight_norm"}));
  CHECK(any_has(stock.problems, {"_weight_norm"}));
}

TEST_CASE("verify: half types", "[verify]") {
  const Setting s(torch::kBFloat16);
  const auto found =
      s.verified([&](const Tensor& x) { return torch::matmul(torch::tanh(torch::matmul(x, s.a)), s.b); });
  CHECK(found.ok());
  CHECK(any_has(found.notes, {"half types"}));
  CHECK(has(found.difference_refusal, {"BFloat16"}));
  CHECK(has(found.text(), {test_device().is_cpu() ? "BFloat16 on cpu" : "BFloat16 on cuda:0"}));
}

TEST_CASE("verify: the input's Jacobian", "[verify]") {
  const Setting s;
  const microreg::FunctionModel model{
      [&](const Tensor& x) { return torch::matmul(torch::tanh(torch::matmul(x, s.a)), s.b); }, {s.a, s.b}};
  const auto found = microreg::verify(model, cross_entropy, microreg::InputJacobian{}, s.x, s.y);
  INFO(found.text());
  CHECK(found.ok());
  CHECK(found.difference_error.value() < 1e-5);
  CHECK_FALSE(s.x.requires_grad());
}

TEST_CASE("verify: values that are not finite", "[verify]") {
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  const auto check = [](const microreg::Verification& found, std::initializer_list<const char*> words) {
    INFO(found.text());
    REQUIRE_FALSE(found.problems.empty());
    CHECK(has(found.problems.front(), words));
    CHECK_FALSE(any_has(found.problems, {"apart"}));
  };
  const auto network = [](const Setting& s) -> Forward {
    return [&s](const Tensor& x) { return torch::matmul(torch::tanh(torch::matmul(x, s.a)), s.b); };
  };
  {
    Setting s;
    s.x[1][2] = nan;
    check(s.verified(network(s)), {"the loss is nan", "which comes from input", "1 NaN"});
  }
  {
    Setting s;
    {
      const torch::NoGradGuard no_grad;
      s.b[0] = nan;
    }
    check(s.verified(network(s)), {"the loss is nan", "which comes from parameter parameters[1]", "5 NaN"});
  }
  {
    Setting s;
    s.x[1][2] = std::numeric_limits<double>::infinity();
    check(s.verified([&](const Tensor& x) { return network(s)(x - x.detach()); }), {"which comes from input", "1 inf"});
  }
  {
    const Setting s;
    check(s.verified([&](const Tensor& x) { return network(s)(x).log(); }),
          {"the loss is nan", "are finite", "logarithm"});
  }
  {
    Setting s;  // of a sample that another micro-batch has
    s.x[11][2] = nan;
    const microreg::FunctionModel<Forward> model{network(s), {s.a, s.b}};
    const auto found =
        microreg::verify(model, cross_entropy, microreg::GradientNorm{}, s.x, s.y, {.micro_batch_size = 4});
    CHECK(any_has(found.notes, {"NaN", "input"}));
  }
}

TEST_CASE("verify leaves no trace", "[verify]") {
  torch::manual_seed(2);
  Everything model;
  const auto estimator =
      GENERATE(microreg::Estimator(microreg::Exact{}), microreg::Estimator(microreg::CentralDifference{}));
  model->first->weight.mutable_grad() = torch::ones_like(model->first->weight);
  const Tensor x = torch::randn({12, 6});
  const Tensor y = torch::randint(5, {12});
  const Tensor x_before = x.clone();
  const microreg::RegularizerOptions options{.strength = 0.1, .micro_batch_size = 4, .estimator = estimator};
  const auto verified = [&] {
    return microreg::verify(model, cross_entropy, microreg::GradientNorm{} + microreg::FisherTrace{}, x, y, options);
  };
  {
    const Watch watch(*model);
    CHECK(verified().ok());
    CHECK(watch.unchanged());
  }
  // At whichever pass the model throws.
  int throws = 0;
  for (int at = 1; at < 60; at += 3) {
    model->throws_at = at;
    model->calls = 0;
    const Watch watch(*model);
    try {
      (void)verified();
    } catch (const std::domain_error&) {
      ++throws;
    }
    CHECK(watch.unchanged());
  }
  CHECK(throws > 5);
  CHECK(same_bits(x, x_before));
}

TEST_CASE("verify: a model that writes to its batch leaves it as it was", "[verify]") {
  const Setting s;
  const Tensor before = s.x.clone();
  const auto found = s.verified(
      [&](const Tensor& x) { return torch::matmul(torch::tanh(torch::matmul(Tensor(x).mul_(2), s.a)), s.b); });
  CHECK(same_bits(s.x, before));
  CHECK(has(found.difference_refusal, {"input", "in place"}));
  CHECK(found.fused_error.value() < 1e-12);
}

TEST_CASE("verify: a sparse gradient is refused with its parameter", "[verify]") {
  torch::nn::Sequential model(torch::nn::Embedding(torch::nn::EmbeddingOptions(7, 5).sparse(true)));
  CHECK(has(message_of<microreg::ModelError>([&] {
              (void)microreg::verify(model, cross_entropy, microreg::GradientNorm{}, torch::randint(7, {4}),
                                     torch::randint(5, {4}));
            }),
            {"0.weight", "sparse"}));
}

TEST_CASE("verify throws what no step can begin with", "[verify]") {
  Setting s;
  const Forward forward = [&](const Tensor& x) { return torch::matmul(torch::matmul(x, s.a), s.b); };
  const microreg::FunctionModel<Forward> model{forward, {s.a, s.b}};
  const auto verified = [&](const auto& of, const Tensor& y, microreg::RegularizerOptions options = {}) {
    (void)microreg::verify(of, cross_entropy, microreg::GradientNorm{}, s.x, y, options);
  };
  CHECK(has(message_of<microreg::BatchError>([&] { verified(model, s.y.narrow(0, 0, 3)); }), {"12", "3"}));
  CHECK(has(message_of<microreg::OptionError>([&] { verified(model, s.y, {.micro_batch_size = 0}); }),
            {"micro_batch_size"}));
  CHECK(has(message_of<microreg::ModelError>([&] { verified(microreg::FunctionModel<Forward>{forward, {}}, s.y); }),
            {"no parameter"}));
  const microreg::FunctionModel<Forward> cut{[&](const Tensor& x) { return forward(x).detach(); }, {s.a, s.b}};
  CHECK(has(message_of<microreg::ModelError>([&] { verified(cut, s.y); }), {"carries no graph"}));
}
