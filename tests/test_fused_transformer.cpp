// Double backward of layer normalisation, GELU and softmax inside a FusedScope against LibTorch's own.
#include "fused_helpers.hpp"

#include <microreg/fused/gelu.hpp>
#include <microreg/fused/layer_norm.hpp>

#include <array>

using namespace helpers;

namespace {

/// Something nonlinear before the operation under test, so that its input has a second derivative of its own.
torch::Tensor bend(const torch::Tensor& x) { return x + 0.1 * x.pow(2); }

std::vector<torch::Tensor> normalised(const std::vector<std::int64_t>& shape, std::size_t kept, torch::Dtype type,
                                      bool affine, bool strided, std::array<bool, 3> requires_grad) {
  torch::manual_seed(5);
  torch::Tensor x = torch::randn(shape, type);
  if (strided) {
    x = torch::stack({x, x}, -1).select(-1, 0);
  }
  std::vector<torch::Tensor> inputs{x.detach().requires_grad_(requires_grad[0])};
  if (affine) {
    const std::vector<std::int64_t> rest(shape.end() - static_cast<std::ptrdiff_t>(kept), shape.end());
    inputs.push_back((torch::rand(rest, type) + 0.5).requires_grad_(requires_grad[1]));
    inputs.push_back(torch::randn(rest, type).requires_grad_(requires_grad[2]));
  }
  return inputs;
}

Function layer_norm(std::size_t kept) {
  return [kept](const std::vector<torch::Tensor>& in) {
    const auto sizes = in[0].sizes();
    return torch::layer_norm(bend(in[0]), sizes.slice(sizes.size() - kept), in.size() > 1 ? in[1] : torch::Tensor(),
                             in.size() > 1 ? in[2] : torch::Tensor());
  };
}

const std::vector<std::pair<std::vector<std::int64_t>, std::size_t>> row_shapes = {
    {{4, 7}, 1},     {{3, 5, 16}, 1}, {{3, 5, 33}, 1},   {{1, 64}, 1},
    {{200, 130}, 1}, {{6, 4, 5}, 2},  {{2, 3, 4, 5}, 3}, {{5, 2}, 1},
};

const Function gelu = [](const std::vector<torch::Tensor>& in) { return torch::gelu(bend(in[0]) * 2); };
Function softmax(std::int64_t dim) {
  return [dim](const std::vector<torch::Tensor>& in) { return torch::softmax(bend(in[0]), dim); };
}

}  // namespace

TEST_CASE("fused layer normalisation equals stock over shapes, layouts and types", "[fused]") {
  for (const auto& [shape, kept] : row_shapes) {
    for (const torch::Dtype type : {torch::kFloat64, torch::kFloat32}) {
      if (type == torch::kFloat32 && shape.back() == 2) {
        continue;  // LibTorch's own is off there, further than ours: test_fused_normalisation.cpp
      }
      for (const bool affine : {true, false}) {
        for (const bool strided : {true, false}) {
          INFO("shape " << shape << ", " << type << ", affine " << affine << ", strided " << strided);
          CHECK(fused_error(layer_norm(kept), normalised(shape, kept, type, affine, strided, {true, true, true})) <
                tolerance(type));
        }
      }
    }
  }
}

TEST_CASE("fused layer normalisation gives the gradients of any subset of its inputs", "[fused]") {
  for (unsigned subset = 1; subset < 8; ++subset) {
    INFO("subset " << subset);
    const std::array<bool, 3> requires_grad{(subset & 1) != 0, (subset & 2) != 0, (subset & 4) != 0};
    CHECK(fused_error(layer_norm(1), normalised({4, 3, 20}, 1, torch::kFloat64, true, false, requires_grad)) < 1e-9);
  }
}

TEST_CASE("the ATen form of layer normalisation, which CUDA runs, equals the CPU kernels", "[fused]") {
  torch::manual_seed(1);
  const auto rows = [] { return torch::randn({150, 37}, torch::kFloat64); };
  const auto vector = [] { return torch::randn({37}, torch::kFloat64); };
  const torch::Tensor x = rows();
  const auto in = microreg::detail::layer_norm_problem(
      rows(), x, vector(), x.mean(-1), (x.var(-1, /*unbiased=*/false) + 1e-5).rsqrt(), {rows(), vector(), vector()});
  for (unsigned missing = 0; missing < 7; ++missing) {  // not all three
    auto some = in;
    some.v = (missing & 1) != 0 ? torch::Tensor() : in.v;
    some.a = (missing & 2) != 0 ? torch::Tensor() : in.a;
    some.b = (missing & 4) != 0 ? torch::Tensor() : in.b;
    const torch::NoGradGuard no_graph;  // or the kernels would not be asked
    const auto aten = microreg::detail::norm_double_backward_aten(some, {true, true, true});
    const auto kernels = microreg::detail::layer_norm_double_backward(some, {true, true, true});
    for (std::size_t i = 0; i < 3; ++i) {
      INFO("missing " << missing << ", result " << i);
      CHECK((aten[i] - kernels[i]).norm().item<double>() < 1e-10);
    }
  }
}

TEST_CASE("layer normalisation far from zero or of long rows is as accurate as LibTorch's, for CUDA too", "[fused]") {
  const Function function = [](const std::vector<torch::Tensor>& in) {
    return torch::layer_norm(in[0], in[1].sizes(), in[1], in[2]);
  };
  struct Case {
    std::int64_t rows, length;
    double offset;
  };
  for (const Case& c : {Case{64, 192, 0}, Case{64, 192, 1e3}, Case{64, 192, 1e4}, Case{4, 1 << 20, 0}}) {
    INFO(c.rows << " rows of " << c.length << ", offset " << c.offset);
    const NormCase norm({c.rows, c.length}, {c.length}, c.offset);
    norm.check(function, norm.double_backward(function, torch::kFloat32, true), c.length < 1000 ? 2.5e-7 : 1e-7);
    const torch::NoGradGuard no_graph;
    const auto [y, mean, rstd] = at::native_layer_norm(norm.x, {c.length}, norm.weight, norm.bias, 1e-5);
    const auto aten = microreg::detail::norm_double_backward_aten(
        microreg::detail::layer_norm_problem(norm.dy, norm.x, norm.weight, mean, rstd, {norm.v, norm.a, norm.b}),
        {true, true, true});
    norm.check(function, {aten.begin(), aten.end()}, 2.5e-7);
  }
}

TEST_CASE("fused GELU equals stock, far tails included", "[fused]") {
  for (const torch::Dtype type : {torch::kFloat64, torch::kFloat32}) {
    for (const std::int64_t count : {1, 15, 16, 1000, 40000}) {
      INFO(type << ", " << count << " elements");
      torch::manual_seed(9);
      CHECK(fused_error(gelu, {torch::randn({count}, type).requires_grad_()}) < tolerance(type));
      CHECK(fused_error(gelu, {(torch::randn({count}, type) * 6).requires_grad_()}) < tolerance(type));
    }
  }
  // Element by element against float64, where a norm would hide a wrong tail.
  const auto x = torch::linspace(-20, 20, 4001, torch::kFloat64);
  const auto single =
      microreg::detail::gelu_second_derivative(x.to(torch::kFloat32), torch::ones({4001}), torch::ones({4001}));
  const auto density = (x * x * -0.5).exp() / std::sqrt(2 * M_PI);
  const auto exact = density * (2 - x * x);
  CHECK((single.to(torch::kFloat64) - exact).abs().max().item<double>() < 1e-6);
}

TEST_CASE("fused softmax equals stock over shapes and types", "[fused]") {
  for (const torch::Dtype type : {torch::kFloat64, torch::kFloat32}) {
    for (const auto& [shape, kept] : row_shapes) {
      INFO(type << ", shape " << shape);
      torch::manual_seed(9);
      CHECK(fused_error(softmax(-1), {torch::randn(shape, type).requires_grad_()}) < tolerance(type));
      CHECK(fused_error(softmax(0), {torch::randn(shape, type).requires_grad_()}) < tolerance(type));
    }
  }
}

TEST_CASE("rows shorter than a vector, in channels-last", "[fused]") {
  for (const torch::Dtype type : {torch::kFloat64, torch::kFloat32}) {
    INFO(type);
    const auto map = [](const torch::Tensor& t) {
      return t.detach().contiguous(torch::MemoryFormat::ChannelsLast).requires_grad_();
    };
    auto inputs = normalised({2, 3, 4, 3}, 1, type, true, false, {true, true, true});
    inputs[0] = map(inputs[0]);
    CHECK(fused_error(layer_norm(1), inputs) < tolerance(type));
    CHECK(fused_error(softmax(-1), {inputs[0]}) < tolerance(type));
  }
}

TEST_CASE("inside a scope layer normalisation, GELU and softmax are ours", "[fused]") {
  const auto has_node = [](const Function& function, const std::vector<torch::Tensor>& inputs, bool fused,
                           const char* name) {
    return graph_has(second_derivatives(function, inputs, fused).first, name);
  };
  const auto rows = normalised({4, 7}, 1, torch::kFloat32, true, false, {true, true, true});
  const std::vector<torch::Tensor> one{torch::randn({4, 7}, torch::requires_grad())};
  for (const bool fused : {true, false}) {
    CHECK(has_node(layer_norm(1), rows, fused, "microreg::aten::native_layer_norm_backward") == fused);
    CHECK(has_node(gelu, one, fused, "microreg::aten::gelu_backward") == fused);
    CHECK(has_node(softmax(-1), one, fused, "microreg::aten::_softmax_backward_data") ==
          (fused && test_device().is_cpu()));
  }
  const Function tanh_gelu = [](const std::vector<torch::Tensor>& in) { return torch::gelu(in[0], "tanh"); };
  CHECK_FALSE(has_node(tanh_gelu, one, true, "microreg"));
  CHECK_FALSE(has_node(softmax(0), one, true, "microreg"));
}

TEST_CASE("third derivatives through fused layer normalisation, GELU and softmax are exact", "[fused]") {
  for (const bool affine : {true, false}) {
    CHECK(third_derivative_error(layer_norm(1),
                                 normalised({4, 7}, 1, torch::kFloat64, affine, false, {true, true, true})) < 1e-6);
  }
  torch::manual_seed(1);
  const std::vector<torch::Tensor> one{torch::randn({4, 7}, torch::TensorOptions(torch::kFloat64).requires_grad(true))};
  CHECK(third_derivative_error(gelu, one) < 1e-6);
  CHECK(third_derivative_error(softmax(-1), one) < 1e-6);
}
