/// @file
/// Second derivatives with and without FusedScope, for the tests that compare the two.
#pragma once

#include "helpers.hpp"

#include <microreg/fused/scope.hpp>

#include <algorithm>
#include <cmath>
#include <functional>
#include <optional>
#include <string>
#include <unordered_set>
#include <vector>

namespace helpers {

using Function = std::function<torch::Tensor(const std::vector<torch::Tensor>&)>;

/// Whether the graph behind `roots` holds a node whose name contains `part`.
inline bool graph_has(const std::vector<torch::Tensor>& roots, const std::string& part) {
  std::vector<torch::autograd::Node*> open;
  std::unordered_set<torch::autograd::Node*> seen;
  for (const torch::Tensor& root : roots) {
    if (root.defined() && root.grad_fn()) {
      open.push_back(root.grad_fn().get());
    }
  }
  while (!open.empty()) {
    torch::autograd::Node* node = open.back();
    open.pop_back();
    if (node == nullptr || !seen.insert(node).second) {
      continue;
    }
    if (node->name().find(part) != std::string::npos) {
      return true;
    }
    for (const auto& edge : node->next_edges()) {
      open.push_back(edge.function.get());
    }
  }
  return false;
}

inline std::vector<torch::Tensor> differentiable(const std::vector<torch::Tensor>& inputs) {
  std::vector<torch::Tensor> result;
  for (const torch::Tensor& input : inputs) {
    if (input.defined() && input.requires_grad()) {
      result.push_back(input);
    }
  }
  return result;
}

struct SecondDerivatives {
  std::vector<torch::Tensor> first;   // with a graph
  std::vector<torch::Tensor> second;  // of sum of <first, fixed random directions>
};

/// First derivatives of sum y sin y for y = function(inputs), and the derivatives of a random combination of them.
inline SecondDerivatives second_derivatives(const Function& function, const std::vector<torch::Tensor>& inputs,
                                            bool fused, bool create_graph = false) {
  std::optional<microreg::FusedScope> scope;
  if (fused) {
    scope.emplace();
  }
  const torch::Tensor y = function(inputs);
  const auto wanted = differentiable(inputs);
  SecondDerivatives result;
  result.first = torch::autograd::grad({(y * y.sin()).sum()}, wanted, {}, true, true);
  torch::manual_seed(7);
  torch::Tensor combination = torch::zeros({}, wanted.front().options());
  for (const torch::Tensor& gradient : result.first) {
    combination = combination + (gradient * torch::randn_like(gradient)).sum();
  }
  result.second = torch::autograd::grad({combination}, wanted, {}, true, create_graph, true);
  return result;
}

/// The largest relative difference between fused and stock second derivatives. Tensors of norm below `floor` times the
/// largest are compared with that floor: where the exact value is zero, rounding is all there is.
inline double fused_error(const Function& function, const std::vector<torch::Tensor>& inputs) {
  const auto fused = second_derivatives(function, inputs, true).second;
  const auto stock = second_derivatives(function, inputs, false).second;
  double scale = 0;
  for (const torch::Tensor& tensor : stock) {
    scale = std::max(scale, tensor.defined() ? tensor.norm().item<double>() : 0.0);
  }
  double worst = 0;
  for (std::size_t i = 0; i < stock.size(); ++i) {
    const torch::Tensor exact = stock[i].defined() ? stock[i] : torch::zeros_like(inputs[i]);
    const torch::Tensor other = fused[i].defined() ? fused[i] : torch::zeros_like(exact);
    worst =
        std::max(worst, (other - exact).norm().item<double>() / std::max(exact.norm().item<double>(), 1e-2 * scale));
  }
  return worst;
}

/// Third derivatives through a fused operation, in float64, against central differences of LibTorch's second ones. Of
/// the sum of squares of the second derivatives, in a random direction. (LibTorch's own third derivatives are wrong for
/// batch and layer normalisation.)
inline double third_derivative_error(const Function& function, const std::vector<torch::Tensor>& inputs) {
  const auto sum_of_squares = [&](const std::vector<torch::Tensor>& at, bool fused) {
    torch::Tensor sum = torch::zeros({}, torch::kFloat64);
    for (const torch::Tensor& tensor : second_derivatives(function, at, fused, /*create_graph=*/fused).second) {
      sum = tensor.defined() ? sum + tensor.pow(2).sum() : sum;
    }
    return sum;
  };
  std::vector<torch::Tensor> directions;
  torch::manual_seed(13);
  directions.reserve(inputs.size());
  for (const torch::Tensor& input : inputs) {
    directions.push_back(torch::randn_like(input));
  }
  const auto third = torch::autograd::grad({sum_of_squares(inputs, true)}, inputs);
  double derivative = 0;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    derivative += (third[i] * directions[i]).sum().item<double>();
  }
  const auto moved = [&](double step) {
    std::vector<torch::Tensor> at;
    at.reserve(inputs.size());
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      at.push_back((inputs[i] + step * directions[i]).detach().requires_grad_());
    }
    return sum_of_squares(at, false).item<double>();
  };
  constexpr double step = 1e-5;
  const double difference = (moved(step) - moved(-step)) / (2 * step);
  return std::abs(derivative - difference) / std::abs(difference);
}

/// What a normalisation reads, and what comes in for its backward's results, in float32.
struct NormCase {
  torch::Tensor x, weight, bias, dy, v, a, b;

  NormCase(const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& affine, double offset) {
    torch::manual_seed(1);
    x = torch::randn(shape) + offset;
    weight = torch::rand(affine) + 0.5;
    bias = torch::randn(affine);
    dy = torch::randn(shape) + 0.3;
    v = torch::randn(shape) - 0.2;
    a = torch::randn(affine);
    b = torch::randn(affine);
  }

  /// The derivatives of <d_x, v> + <d_weight, a> + <d_bias, b> by dy, x, weight, where d_x, d_weight, d_bias are what
  /// the backward of `function` makes of dy.
  [[nodiscard]] std::vector<torch::Tensor> double_backward(const Function& function, torch::Dtype type,
                                                           bool fused) const {
    const auto leaf = [type](const torch::Tensor& t) { return t.to(type).detach().requires_grad_(); };
    const std::vector<torch::Tensor> inputs{leaf(x), leaf(weight), leaf(bias)};
    const torch::Tensor upstream = leaf(dy);
    const torch::AutoGradMode graph(true);
    const microreg::FusedScope scope(fused);
    const auto first = torch::autograd::grad({function(inputs)}, inputs, {upstream}, true, true);
    return torch::autograd::grad({first}, {upstream, inputs[0], inputs[1]}, {v.to(type), a.to(type), b.to(type)});
  }

  /// Checks that no result is less accurate than LibTorch's in float32, or than `share` of its error, both against
  /// float64. Below `floor` the rounding of the results is all there is.
  void check(const Function& function, const std::vector<torch::Tensor>& ours, double floor = 1e-7,
             double share = 1.5) const {
    const auto exact = double_backward(function, torch::kFloat64, false);
    const auto stock = double_backward(function, torch::kFloat32, false);
    for (std::size_t i = 0; i < exact.size(); ++i) {
      INFO("result " << i << ", LibTorch's error " << relative_error(stock[i], exact[i]));
      CHECK(relative_error(ours[i].view(exact[i].sizes()), exact[i]) <
            std::max(share * relative_error(stock[i], exact[i]), floor));
    }
  }
};

inline double tolerance(torch::Dtype type) { return type == torch::kFloat64 ? 1e-9 : 1e-4; }

}  // namespace helpers
