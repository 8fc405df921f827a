// Half types: the fused formulas on tensors of them, and parameters in them.
#include "fused_helpers.hpp"

#include <microreg/microreg.hpp>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

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
