// Double backward of group normalisation inside a FusedScope against LibTorch's own.
#include "fused_helpers.hpp"

#include <microreg/fused/group_norm.hpp>
#include <microreg/microreg.hpp>

#include <array>

using namespace helpers;

namespace {

enum class Affine { yes, no, weight };  // LibTorch itself cannot differentiate twice with a bias alone

struct Case {
  std::vector<std::int64_t> shape;
  std::int64_t groups;
};

const std::vector<Case> cases = {
    {{3, 6}, 2},         {{3, 6, 7}, 3},     {{2, 8, 4, 4}, 4},    {{2, 8, 5, 3}, 1},  {{1, 6, 5, 5}, 6},
    {{130, 4, 3, 3}, 2}, {{2, 16, 1, 1}, 4}, {{2, 4, 3, 4, 5}, 2}, {{2, 32, 8, 8}, 8},
};

std::vector<torch::Tensor> inputs_of(const Case& c, torch::Dtype type, int layout = 0,
                                     std::array<bool, 3> requires_grad = {true, true, true}) {
  torch::manual_seed(5);
  torch::Tensor x = torch::randn(c.shape, type);
  if (layout == 1 && x.dim() >= 4) {
    x = x.contiguous(x.dim() == 4 ? torch::MemoryFormat::ChannelsLast : torch::MemoryFormat::ChannelsLast3d);
  } else if (layout == 2) {
    x = torch::stack({x, x}, -1).select(-1, 0);
  }
  return {x.detach().requires_grad_(requires_grad[0]),
          (torch::rand({c.shape[1]}, type) + 0.5).requires_grad_(requires_grad[1]),
          torch::randn({c.shape[1]}, type).requires_grad_(requires_grad[2])};
}

Function group_norm(std::int64_t groups, Affine affine = Affine::yes) {
  return [=](const std::vector<torch::Tensor>& in) {
    // A nonlinear function of x first, so that x has a second derivative of its own.
    return torch::group_norm(in[0] + 0.1 * in[0].pow(2), groups, affine == Affine::no ? torch::Tensor() : in[1],
                             affine == Affine::yes ? in[2] : torch::Tensor());
  };
}

/// Those inputs that `affine` speaks of.
std::vector<torch::Tensor> used(const std::vector<torch::Tensor>& inputs, Affine affine) {
  const auto count = affine == Affine::yes ? 3 : affine == Affine::weight ? 2 : 1;
  return {inputs.begin(), inputs.begin() + count};
}

}  // namespace

TEST_CASE("fused group normalisation equals stock over shapes, layouts and types", "[fused]") {
  for (const Case& c : cases) {
    for (const torch::Dtype type : {torch::kFloat64, torch::kFloat32}) {
      for (const int layout : {0, 1, 2}) {
        for (const Affine affine : {Affine::yes, Affine::no, Affine::weight}) {
          INFO("shape " << c.shape << ", " << c.groups << " groups, " << type << ", layout " << layout << ", affine "
                        << static_cast<int>(affine));
          CHECK(fused_error(group_norm(c.groups, affine), used(inputs_of(c, type, layout), affine)) < tolerance(type));
        }
      }
    }
  }
}

TEST_CASE("fused group normalisation gives the gradients of any subset of its inputs", "[fused]") {
  const Case c{{4, 6, 5, 7}, 3};
  for (unsigned subset = 1; subset < 8; ++subset) {
    INFO("subset " << subset);
    const auto inputs = inputs_of(c, torch::kFloat64, 0, {(subset & 1) != 0, (subset & 2) != 0, (subset & 4) != 0});
    CHECK(fused_error(group_norm(c.groups), inputs) < 1e-9);
  }
}

// LibTorch 2.13 crashes there by itself: docs/libtorch-bugs.md.
TEST_CASE("group normalisation in channels-last takes an input without a gradient", "[fused]") {
  const bool volume = GENERATE(false, true);
  const bool penalise_input = GENERATE(false, true);
  torch::manual_seed(6);
  const std::vector<std::int64_t> shape =
      volume ? std::vector<std::int64_t>{4, 8, 3, 5, 2} : std::vector<std::int64_t>{4, 8, 6, 5};
  const torch::Tensor x =
      torch::randn(shape, torch::kFloat64)
          .contiguous(volume ? torch::MemoryFormat::ChannelsLast3d : torch::MemoryFormat::ChannelsLast);
  const torch::Tensor w = (torch::rand({8}, torch::kFloat64) + 0.5).requires_grad_();
  const torch::Tensor b = torch::randn({8}, torch::kFloat64).requires_grad_();
  const torch::Tensor h = torch::randn({3, 8}, torch::kFloat64).requires_grad_();
  const std::vector<torch::Tensor> parameters{w, b, h};
  const auto head = [&](const torch::Tensor& y) { return torch::linear(y.flatten(2).square().mean(2), h); };
  const auto loss_of = [](const torch::Tensor& output) { return output.logsumexp(1).square().mean(); };
  const auto by_hand = [&](const torch::Tensor& input) {
    const torch::Tensor groups = input.contiguous().view({4, 2, -1});
    const torch::Tensor centred = groups - groups.mean(2, true);
    const torch::Tensor y = (centred / (centred.square().mean(2, true) + 1e-5).sqrt()).view({4, 8, -1});
    return head(y * w.view({1, 8, 1}) + b.view({1, 8, 1}));
  };
  microreg::FunctionModel model{[&](const torch::Tensor& input) { return head(torch::group_norm(input, 2, w, b)); },
                                parameters};
  const torch::Tensor input = x.clone().requires_grad_();
  const torch::Tensor output = by_hand(input), loss = loss_of(output);
  torch::Tensor expected = flattened(torch::autograd::grad({loss}, parameters, {}, /*retain_graph=*/true), parameters);
  if (penalise_input) {
    torch::Tensor value = torch::zeros({}, x.options());
    for (const torch::Tensor& each : output.sum(0).unbind()) {
      value = value + torch::autograd::grad({each}, {input}, {}, true, true)[0].square().sum() / 4;
    }
    expected =
        expected + 1e-2 * flattened(torch::autograd::grad({value}, parameters, {}, false, false, true), parameters);
  } else {
    expected = expected + 1e-2 * penalty_by_hand(loss, parameters);
  }
  const auto step = [&](auto penalty) {
    microreg::Regularizer regularizer(model, loss_of, penalty, {.strength = 1e-2});
    (void)regularizer.backward(x);
  };
  if (penalise_input) {
    step(microreg::InputJacobian{.expectation = microreg::Expectation::exact});
  } else {
    step(microreg::GradientNorm{});
  }
  CHECK(relative_error(flat_grad(parameters), expected) < 1e-12);
}

TEST_CASE("group normalisation recorded in a scope has its gradients after the scope too", "[fused]") {
  const Case c{{4, 6, 5, 7}, 3};
  const auto inputs = inputs_of(c, torch::kFloat64);
  const auto gradient = [&](bool fused, bool create_graph) {
    torch::Tensor y;
    {
      const microreg::FusedScope scope(fused);
      y = group_norm(c.groups)(inputs).sin().sum();
    }
    return torch::autograd::grad({y}, inputs, {}, true, create_graph);
  };
  for (const bool create_graph : {true, false}) {
    const auto fused = gradient(true, create_graph);
    const auto stock = gradient(false, false);
    for (std::size_t i = 0; i < 3; ++i) {
      CHECK(relative_error(fused[i], stock[i]) < 1e-12);
    }
  }
}

TEST_CASE("inside a scope, and only there, group normalisation is ours", "[fused]") {
  const auto inputs = inputs_of(cases[2], torch::kFloat32);
  const Function function = group_norm(cases[2].groups);
  CHECK(graph_has(second_derivatives(function, inputs, true).first, "microreg::aten::native_group_norm_backward"));
  CHECK_FALSE(graph_has(second_derivatives(function, inputs, false).first, "microreg"));
  const auto weight_alone = group_norm(cases[2].groups, Affine::weight);
  CHECK_FALSE(graph_has(second_derivatives(weight_alone, used(inputs, Affine::weight), true).first, "microreg"));
  // Wrong arguments are LibTorch's to refuse.
  const microreg::FusedScope scope;
  CHECK_THROWS_AS(torch::group_norm(inputs[0], 3), c10::Error);
  CHECK_THROWS_AS(torch::group_norm(inputs[0], 4, torch::ones({7}), torch::ones({7})), c10::Error);
}

TEST_CASE("group normalisation far from zero or of large maps is as accurate as LibTorch's, for CUDA too", "[fused]") {
  const Function function = [](const std::vector<torch::Tensor>& in) {
    return torch::group_norm(in[0], 2, in[1], in[2]);
  };
  struct Map {
    std::vector<std::int64_t> shape;
    double offset;
  };
  for (const Map& c :
       {Map{{16, 8, 12, 12}, 0}, Map{{16, 8, 12, 12}, 1e3}, Map{{16, 8, 12, 12}, 1e4}, Map{{1, 4, 1024, 1024}, 0}}) {
    INFO("shape " << c.shape << ", offset " << c.offset);
    const std::int64_t channels = c.shape[1];
    const NormCase norm(c.shape, {channels}, c.offset);
    norm.check(function, norm.double_backward(function, torch::kFloat32, true));
    const torch::NoGradGuard no_graph;
    const auto [y, mean, rstd] =
        at::native_group_norm(norm.x, norm.weight, norm.bias, c.shape[0], channels, c.shape[2] * c.shape[3], 2, 1e-5);
    const auto aten = microreg::detail::norm_double_backward_aten(
        microreg::detail::group_norm_problem(norm.dy, norm.x, norm.weight, mean, rstd, 2, {norm.v, norm.a, norm.b}),
        {true, true, true});
    norm.check(function, {aten.begin(), aten.end()}, 3e-7);
  }
}

TEST_CASE("third derivatives through fused group normalisation are exact", "[fused]") {
  for (const Affine affine : {Affine::yes, Affine::no}) {
    const auto inputs = used(inputs_of({{3, 4, 3}, 2}, torch::kFloat64), affine);
    CHECK(third_derivative_error(group_norm(2, affine), inputs) < 1e-6);
  }
}
