// Double backward of piecewise-linear activations inside a FusedScope against LibTorch's own.
#include "fused_helpers.hpp"

#include <string>
#include <utility>

using namespace helpers;

namespace {

/// Something nonlinear before the activation, so that its input has a second derivative of its own.
torch::Tensor bend(const torch::Tensor& x) { return x + 0.1 * x.pow(2); }

using Activation = torch::Tensor (*)(torch::Tensor&);  // some work in place
const std::vector<std::pair<std::string, Activation>> activations = {
    {"relu", [](torch::Tensor& x) { return torch::relu(x); }},
    {"relu_", [](torch::Tensor& x) { return torch::relu_(x); }},
    {"threshold", [](torch::Tensor& x) { return torch::threshold(x, 0.3, -2); }},
    {"hardtanh", [](torch::Tensor& x) { return torch::hardtanh(x, -0.5, 0.7); }},
    {"hardtanh_", [](torch::Tensor& x) { return torch::hardtanh_(x, -0.5, 0.7); }},
    {"relu6", [](torch::Tensor& x) { return torch::relu6(x); }},
    {"leaky_relu", [](torch::Tensor& x) { return torch::leaky_relu(x, 0.2); }},
    {"leaky_relu_", [](torch::Tensor& x) { return torch::leaky_relu_(x, 0.2); }},
    {"leaky_relu, falling", [](torch::Tensor& x) { return torch::leaky_relu(x, -0.2); }},
};

Function after_bend(Activation activation) {
  return [activation](const std::vector<torch::Tensor>& in) {
    torch::Tensor x = bend(in[0]);
    return activation(x);
  };
}

std::vector<torch::Tensor> input(torch::Dtype type, torch::MemoryFormat format = torch::MemoryFormat::Contiguous) {
  torch::manual_seed(5);
  return {torch::randn({3, 5, 7, 6}, type).contiguous(format).requires_grad_()};
}

}  // namespace

TEST_CASE("fused piecewise-linear activations equal stock over layouts and types", "[fused]") {
  for (const auto& [name, activation] : activations) {
    for (const torch::Dtype type : {torch::kFloat64, torch::kFloat32}) {
      for (const auto format : {torch::MemoryFormat::Contiguous, torch::MemoryFormat::ChannelsLast}) {
        INFO(name << ", " << type << ", " << format);
        CHECK(fused_error(after_bend(activation), input(type, format)) < tolerance(type));
        const auto fused = second_derivatives(after_bend(activation), input(type, format), true);
        CHECK(graph_has(fused.first, "microreg::aten::"));
      }
    }
    INFO(name);
    CHECK(third_derivative_error(after_bend(activation), input(torch::kFloat64)) < 1e-6);
  }
}

TEST_CASE("a piecewise-linear activation's second derivative is nothing, where LibTorch makes zeros", "[fused]") {
  for (const auto& [name, activation] : activations) {
    INFO(name);
    const auto second = [&, bend = activation](bool wanted) {
      const microreg::FusedScope scope(wanted);
      const auto x = input(torch::kFloat32);
      torch::Tensor copy = x[0] * 1;
      const auto first = torch::autograd::grad({bend(copy).sum()}, x, {}, true, true);
      REQUIRE(first[0].requires_grad());
      return torch::autograd::grad({first[0].sum()}, x, {}, false, false, true)[0];
    };
    CHECK_FALSE(second(true).defined());
    const torch::Tensor stock = second(false);
    CHECK((stock.defined() && stock.count_nonzero().item<std::int64_t>() == 0));
  }
}
