// Half types: the fused formulas on tensors of them, Autocast, parameters in them.
#include "fused_helpers.hpp"
#include "networks.hpp"

#include <ATen/autocast_mode.h>
#include <microreg/autocast.hpp>
#include <microreg/microreg.hpp>

#include <limits>

using namespace helpers;

namespace {

double epsilon_of(torch::Dtype type) { return type == torch::kHalf ? 0x1p-10 : 0x1p-7; }

/// An operation, the shapes of its inputs, and whether all but the first stay in float32, as weights under Autocast do.
struct HalfCase {
  std::string name;
  Function function;
  std::vector<std::vector<std::int64_t>> shapes;
  bool mixed = false;
};

using Tensors = std::vector<torch::Tensor>;

const std::vector<HalfCase> half_cases = {
    {"convolution",
     [](const Tensors& in) { return torch::conv2d(in[0], in[1], in[2], 1, 1); },
     {{3, 4, 6, 6}, {5, 4, 3, 3}, {5}}},
    {"strided pointwise convolution",
     [](const Tensors& in) { return torch::conv2d(in[0], in[1], {}, 2); },
     {{3, 4, 6, 6}, {5, 4, 1, 1}}},
    {"batch_norm",
     [](const Tensors& in) { return torch::batch_norm(in[0], in[1], in[2], {}, {}, true, 0.1, 1e-5, false); },
     {{6, 4, 5, 5}, {4}, {4}}},
    {"batch_norm, float32 weights",
     [](const Tensors& in) { return torch::batch_norm(in[0], in[1], in[2], {}, {}, true, 0.1, 1e-5, false); },
     {{6, 4, 5, 5}, {4}, {4}},
     true},
    {"layer_norm",
     [](const Tensors& in) { return torch::layer_norm(in[0], {16}, in[1], in[2]); },
     {{9, 16}, {16}, {16}}},
    {"layer_norm, float32 weights",
     [](const Tensors& in) { return torch::layer_norm(in[0], {16}, in[1], in[2]); },
     {{9, 16}, {16}, {16}},
     true},
    {"group_norm",
     [](const Tensors& in) { return torch::group_norm(in[0], 2, in[1], in[2]); },
     {{3, 4, 5, 5}, {4}, {4}}},
    {"softmax", [](const Tensors& in) { return torch::softmax(in[0], -1); }, {{5, 11}}},
    {"gelu", [](const Tensors& in) { return torch::gelu(in[0]); }, {{5, 11}}},
    {"relu", [](const Tensors& in) { return torch::relu(in[0]) * in[0]; }, {{5, 11}}},
    {"max_pool2d", [](const Tensors& in) { return torch::max_pool2d(in[0], 2) * 1.5; }, {{2, 3, 6, 6}}},
};

/// All that a half type needs: the numbers drawn once, rounded to it, and kept in float64 for the reference.
struct HalfProblem {
  Tensors inputs, seeds;  // what comes in for the gradients of the inputs
  torch::Tensor dy;
  torch::Dtype type;
  bool mixed;

  HalfProblem(const HalfCase& of, torch::Dtype half) : type(half), mixed(of.mixed) {
    torch::manual_seed(5);
    const auto draw = [&](const std::vector<std::int64_t>& shape) {
      return torch::randn(shape, torch::kFloat64).to(half).to(torch::kFloat64);
    };
    for (const auto& shape : of.shapes) {
      inputs.push_back(draw(shape));
      seeds.push_back(draw(shape));
    }
    dy = draw(of.function(inputs).sizes().vec());
  }

  [[nodiscard]] torch::Dtype type_of(std::size_t input, torch::Dtype asked) const {
    return asked == type && mixed && input > 0 ? torch::kFloat32 : asked;
  }

  /// The derivatives of sum <gradient of input i, seed i> by dy and the inputs, all in one vector of float64.
  [[nodiscard]] torch::Tensor double_backward(const Function& function, torch::Dtype in, bool fused,
                                              bool* ours = nullptr) const {
    const microreg::FusedScope scope(fused);
    Tensors leaves, directions;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      leaves.push_back(inputs[i].to(type_of(i, in)).detach().requires_grad_());
      directions.push_back(seeds[i].to(type_of(i, in)));
    }
    const torch::Tensor upstream = dy.to(in).detach().requires_grad_();
    const torch::Tensor result = function(leaves);
    const auto first = torch::autograd::grad({result}, leaves, {upstream.to(result.scalar_type())}, true, true);
    if (ours != nullptr) {
      *ours = graph_has(first, "microreg");
    }
    Tensors by = leaves;
    by.push_back(upstream);
    const auto second = torch::autograd::grad(first, by, directions, false, false, true);
    Tensors parts;
    for (std::size_t i = 0; i < by.size(); ++i) {
      if (second[i].defined()) {
        CHECK(second[i].scalar_type() == by[i].scalar_type());
      }
      parts.push_back((second[i].defined() ? second[i] : torch::zeros_like(by[i])).to(torch::kFloat64).flatten());
    }
    return torch::cat(parts);
  }
};

torch::Tensor exact_step(const torch::nn::Module& model, const std::function<void()>& step) {
  clear_grad(model.parameters());
  step();
  return flat_grad(model.parameters());
}

}  // namespace

TEST_CASE("fused formulas take half types, and are as accurate as LibTorch in them", "[half]") {
  const auto type = GENERATE(torch::kBFloat16, torch::kHalf);
  for (const HalfCase& of : half_cases) {
    const HalfProblem problem(of, type);
    const torch::Tensor exact = problem.double_backward(of.function, torch::kFloat64, false);
    bool ours = false;
    const double fused = relative_error(problem.double_backward(of.function, type, true, &ours), exact);
    const double stock = relative_error(problem.double_backward(of.function, type, false), exact);
    INFO(of.name << " in " << type << ": fused " << fused << ", LibTorch " << stock);
    CHECK(ours);
    CHECK(fused < std::max(1.1 * stock, epsilon_of(type)));
  }
}

TEST_CASE("Autocast takes its state back, also nested and after an error", "[half]") {
  const auto state = [] {
    return std::make_pair(at::autocast::is_autocast_enabled(at::kCPU), at::autocast::get_autocast_dtype(at::kCPU));
  };
  const auto before = state();
  try {
    const microreg::Autocast outer(at::kCPU, at::kBFloat16);
    CHECK(torch::matmul(torch::ones({2, 2}, at::kCPU), torch::ones({2, 2}, at::kCPU)).scalar_type() ==
          torch::kBFloat16);
    {
      const microreg::Autocast inner(at::kCPU, at::kHalf);
      CHECK(state().second == at::kHalf);
    }
    CHECK(state() == std::make_pair(true, at::kBFloat16));
    throw std::runtime_error("in the middle");
  } catch (const std::runtime_error&) {
    CHECK(state() == before);
  }
  CHECK(has(message_of<microreg::OptionError>([] { const microreg::Autocast wrong(at::kCPU, at::kFloat); }),
            {"Float", "BFloat16", "Half"}));
  CHECK(state() == before);
}

TEST_CASE("a step under Autocast: by the option, around forward and loss, around all", "[half]") {
  torch::manual_seed(4);
  networks::Cnn model(networks::Norm::batch, networks::Activation::kinked);
  const torch::Tensor x = torch::randn({8, 2, 6, 6});
  const torch::Tensor y = torch::randint(networks::classes, {8});
  const auto penalty = microreg::GradientNorm{} + 0.5 * microreg::AverageJacobian{};
  const microreg::RegularizerOptions options{.strength = 0.1, .micro_batch_size = 4};
  const auto device = test_device().type();
  microreg::Report report;
  const auto with = [&](const microreg::RegularizerOptions& chosen) {
    microreg::Regularizer regularizer(model, cross_entropy, penalty, chosen);
    report = regularizer.backward(x, y);
  };
  const torch::Tensor full = exact_step(*model, [&] { with(options); });
  microreg::RegularizerOptions half = options;
  half.autocast = torch::kBFloat16;
  const torch::Tensor by_option = exact_step(*model, [&] { with(half); });
  CHECK(relative_error(by_option, full) < 0.03);
  CHECK(relative_error(by_option, full) > 1e-5);  // it did something
  CHECK(report.penalties[0].value.scalar_type() == torch::kFloat32);

  const torch::Tensor around_all = exact_step(*model, [&] {
    const microreg::Autocast guard(device);
    with(options);
  });
  CHECK(same_bits(around_all, by_option));

  half.fused = false;
  const torch::Tensor stock = exact_step(*model, [&] { with(half); });
  CHECK(relative_error(by_option, stock) < 0.02);

  CHECK(has(message_of<microreg::OptionError>([&] { with({.autocast = torch::kFloat64}); }), {"autocast", "Double"}));
}

TEST_CASE("gradients of parameters in half types add up in float32", "[half]") {
  const auto type = GENERATE(torch::kBFloat16, torch::kHalf);
  constexpr std::int64_t samples = 2048;
  torch::Tensor w = torch::ones({3}, type).requires_grad_();
  microreg::FunctionModel model{[&](const torch::Tensor& x) { return (x * w).sum(1); }, {w}};
  microreg::Regularizer regularizer(model,
                                    [](const torch::Tensor& output, const torch::Tensor&) { return output.mean(); },
                                    microreg::GradientNorm{}, {.strength = 0.25, .micro_batch_size = 1});
  const torch::Tensor x = torch::ones({samples, 3}, type);
  const microreg::Report report = regularizer.backward(x, torch::zeros({samples}));
  CHECK(w.grad().scalar_type() == type);
  // The loss is linear: its gradient is 1 in each element, the penalty's 0.
  CHECK(relative_error(w.grad(), torch::ones({3})) < epsilon_of(type));
  CHECK(report.penalties[0].value.item<double>() == Approx(3.0).epsilon(1e-3));
}

TEST_CASE("float16 loses no penalty to underflow, at any strength", "[half]") {
  // The loss 50 ||w||^2 has the gradient 100 w = 0.01 in each element, the penalty 2 strength 100^2 w: a fifth of it at
  // a strength of 1e-3. Seeds, 2 strength weight g, are 2e-8 in the second case, where float16 has nothing left.
  const std::int64_t samples = GENERATE(1, 1024);
  torch::Tensor w = torch::full({1000}, 1e-4, torch::kHalf).requires_grad_();
  microreg::FunctionModel model{[&](const torch::Tensor& x) { return w.square() * x.sum() * 50; }, {w}};
  const auto loss = [](const torch::Tensor& output, const torch::Tensor&) { return output.to(torch::kFloat).sum(); };
  const torch::Tensor x = torch::ones({samples}, torch::kHalf);
  const auto gradient = [&](double strength, double scale) {
    clear_grad({w});
    microreg::Regularizer regularizer(model, loss, microreg::GradientNorm{},
                                      {.strength = strength, .micro_batch_size = 1, .loss_scale = scale});
    const microreg::Report report = regularizer.backward(x, torch::zeros({samples}));
    return std::make_pair(w.grad().to(torch::kFloat64).mean().item<double>(), report.penalties[0].value.item<double>());
  };
  const double g = 100 * w.detach()[0].item<double>();
  const double norm = 1000 * g * g;
  for (const double scale : {1.0, 1024.0}) {
    for (const double strength : {1e-2, 1e-3, 1e-4}) {
      const auto [found, value] = gradient(strength, scale);
      INFO(samples << " micro-batches, strength " << strength << ", scale " << scale);
      CHECK(found == Approx(g * (1 + 200 * strength)).epsilon(2e-3));
      CHECK(value == Approx(norm).epsilon(2e-3));
    }
  }
}

TEST_CASE("a loss scale changes nothing but what underflows", "[half]") {
  torch::manual_seed(4);
  networks::Mlp model;
  model->to(torch::kFloat64);
  const torch::Tensor x = torch::randn({8, 6}, torch::kFloat64);
  const torch::Tensor y = torch::randint(networks::classes, {8});
  const auto penalty = GENERATE(0, 1, 2);
  const auto expression = [&]() -> microreg::AnyPenalty<> {
    if (penalty == 0) {
      return microreg::GradientNorm{};
    }
    if (penalty == 1) {
      return 0.3 * microreg::AverageJacobian{} + microreg::Unsquared{microreg::GradientNorm{}};
    }
    return microreg::InputJacobian{} + 0.0 * microreg::AverageJacobian{};
  };
  const auto found = [&](double scale, double strength, microreg::ParameterSelection select) {
    microreg::Report report;
    torch::manual_seed(9);  // for the direction of InputJacobian
    const torch::Tensor gradient = exact_step(*model, [&] {
      microreg::Regularizer<> regularizer(
          model, cross_entropy, expression(),
          {.strength = strength, .micro_batch_size = 4, .select = std::move(select), .loss_scale = scale});
      report = regularizer.backward(x, y);
    });
    std::vector<torch::Tensor> parts{gradient, report.loss.reshape(1), report.gradient_norm.reshape(1)};
    for (const auto& each : report.penalties) {
      parts.push_back(each.value.reshape(1));
    }
    return torch::cat(parts);
  };
  const auto weights = [](const std::string&, const torch::Tensor& p) { return p.dim() > 1; };
  for (const double strength : {0.2, 0.0}) {
    CAPTURE(penalty, strength);
    CHECK(relative_error(found(512, strength, {}), found(1, strength, {})) < 1e-14);
    CHECK(relative_error(found(512, strength, weights), found(1, strength, weights)) < 1e-14);
  }
  const auto refused = [&](const microreg::RegularizerOptions& options) {
    return message_of<microreg::OptionError>(
        [&] { microreg::Regularizer<>(model, cross_entropy, microreg::GradientNorm{}, options); });
  };
  CHECK(has(refused({.loss_scale = 0}), {"loss_scale", "0", "positive"}));
  CHECK(has(refused({.estimator = microreg::ForwardDifference{}, .loss_scale = 8}), {"loss_scale", "Exact"}));
}

TEST_CASE("a dynamic loss scale finds where nothing overflows", "[half]") {
  using microreg::DynamicLossScale;
  // float16 ends at 65504, and the backward pass of this loss goes through 50 S: 1024 fits, 2048 does not.
  const double fits = 1024;
  torch::Tensor w = torch::full({1000}, 1e-4, torch::kHalf).requires_grad_();
  microreg::FunctionModel model{[&](const torch::Tensor& x) { return w.square() * x.sum() * 50; }, {w}};
  bool fails = false;
  const auto loss = [&](const torch::Tensor& output, const torch::Tensor&) {
    if (fails) {
      throw std::runtime_error("a loss that fails");
    }
    return output.to(torch::kFloat).sum();
  };
  const torch::Tensor x = torch::ones({2}, torch::kHalf);
  const torch::Tensor y = torch::zeros({2});
  const auto make = [&](const microreg::LossScale& scale, microreg::CheckFinite check) {
    return microreg::Regularizer<>(
        model, loss, microreg::GradientNorm{},
        {.strength = 1e-3, .micro_batch_size = 1, .check_finite = check, .loss_scale = scale});
  };
  const auto scale_of = [](const microreg::Regularizer<>& regularizer) {
    return regularizer.loss_scale().item<double>();
  };
  auto fixed = make(64, microreg::CheckFinite::on_cpu);
  clear_grad({w});
  const microreg::Report expected = fixed.backward(x, y);
  const torch::Tensor gradient = w.grad().clone();

  const auto check = GENERATE(microreg::CheckFinite::on_cpu, microreg::CheckFinite::never);
  auto regularizer = make(DynamicLossScale{.start = 8 * fits, .interval = 2}, check);
  CHECK_FALSE(regularizer.loss_scale().defined());
  microreg::Regularizer<> copy;
  for (const double scale : {8 * fits, 4 * fits, 2 * fits, fits, fits, 2 * fits, fits}) {
    CAPTURE(scale);
    w.mutable_grad() = torch::full({1000}, 0.25, torch::kHalf);
    const microreg::Report report = regularizer.backward(x, y);
    CHECK(report.loss_scale.item<double>() == scale);
    CHECK(report.overflow.item<bool>() == (scale > fits));
    CHECK(report.skipped == (scale > fits && check == microreg::CheckFinite::on_cpu));
    const torch::Tensor added = scale > fits ? torch::zeros({1000}) : gradient.to(torch::kFloat);
    CHECK(relative_error(w.grad().to(torch::kFloat), 0.25 + added) < 1e-3);
    if (scale > fits) {
      CHECK(w.grad().eq(0.25).all().item<bool>());
      CHECK(report.gradient_norm.item<double>() == 0);
    } else {
      CHECK(report.penalties[0].value.item<double>() ==
            Approx(expected.penalties[0].value.item<double>()).epsilon(1e-3));
    }
    if (regularizer.step() == 2) {
      copy = regularizer;
    }
  }
  CHECK(regularizer.skipped() == 4);
  CHECK(regularizer.step() == 7);
  // A copy goes its own way, and a run that resumes begins where it is told to.
  CHECK(copy.skipped() == 2);
  CHECK(scale_of(copy) == 2 * fits);
  copy.set_loss_scale(8);
  CHECK(copy.backward(x, y).loss_scale.item<double>() == 8);

  // What fails changes nothing: not the scale, and no step is counted.
  const double before = scale_of(regularizer);
  fails = true;
  CHECK_THROWS_AS(regularizer.backward(x, y), std::runtime_error);
  CHECK(scale_of(regularizer) == before);
  CHECK(regularizer.step() == 7);
  fails = false;
  // No scale helps where the loss itself is infinite.
  if (check == microreg::CheckFinite::on_cpu) {
    CHECK_THROWS_AS(regularizer.backward(x * INFINITY, y), microreg::NonFiniteError);
    CHECK(scale_of(regularizer) == before);
  }
}

TEST_CASE("a dynamic loss scale in a loop of one's own, and what is no such scale", "[half]") {
  using microreg::DynamicLossScale;
  torch::Tensor w = torch::full({10}, 1e-2, torch::kHalf).requires_grad_();
  const auto loss = [&] { return (w.square() * 50).to(torch::kFloat).sum(); };
  microreg::Penalised penalised(
      {w}, microreg::GradientNorm{},
      {.strength = 1e-2, .loss_scale = DynamicLossScale{.start = 2048}});  // the Hessian, S 100 g, needs 512
  CHECK(penalised.backward(loss()).skipped);
  CHECK(penalised.backward(loss()).skipped);
  CHECK_FALSE(w.grad().defined());
  CHECK_FALSE(penalised.backward(loss()).skipped);
  CHECK(penalised.skipped() == 2);
  CHECK(relative_error(w.grad().to(torch::kFloat), (100 + 2e-2 * 1e4) * w.detach().to(torch::kFloat)) < 2e-3);
  const microreg::Part first{.index = 0, .count = 2};
  CHECK(has(message_of<microreg::OptionError>([&] { penalised.backward(first, loss()); }),
            {"loss_scale is dynamic", "part 0 of 2"}));
  const auto refused = [&](const DynamicLossScale& scale) {
    return message_of<microreg::OptionError>(
        [&] { microreg::Penalised({w}, microreg::GradientNorm{}, {.loss_scale = scale}); });
  };
  CHECK(has(refused({.start = 0}), {"loss_scale is 0"}));
  CHECK(has(refused({.growth = 0.5}), {"growth 0.5"}));
  CHECK(has(refused({.backoff = 1}), {"backoff 1"}));
  CHECK(has(refused({.interval = 0}), {"interval 0"}));
}

TEST_CASE("a difference under Autocast proves itself, or is refused", "[half]") {
  torch::manual_seed(4);
  networks::Cnn model(networks::Norm::batch, networks::Activation::kinked);
  const torch::Tensor x = torch::randn({32, 2, 6, 6});
  const torch::Tensor y = torch::randint(networks::classes, {32});
  const auto penalty_part = [&](const microreg::Estimator& estimator) {
    const auto with = [&](double strength) {
      return exact_step(*model, [&] {
        microreg::Regularizer regularizer(model, cross_entropy, microreg::GradientNorm{},
                                          {.strength = strength, .estimator = estimator, .autocast = torch::kBFloat16});
        (void)regularizer.backward(x, y);
      });
    };
    return (with(1) - with(0)).detach();
  };
  const torch::Tensor exact = penalty_part(microreg::Exact{});
  for (const auto& estimator :
       {microreg::Estimator(microreg::ForwardDifference{}), microreg::Estimator(microreg::CentralDifference{})}) {
    try {
      const torch::Tensor found = penalty_part(estimator);
      CHECK(relative_error(found, exact) < 0.1);
    } catch (const microreg::DifferenceError& error) {
      CHECK(has(error.what(), {"off by", "Exact"}));
    }
  }
}
