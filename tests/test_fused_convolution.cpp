// Double backward of convolution inside a FusedScope against LibTorch's own.
#include "fused_helpers.hpp"

#include <microreg/fused/convolution.hpp>
#include <microreg/microreg.hpp>

#include <array>
#include <vector>

using namespace helpers;

namespace {

struct Case {
  std::string name;
  int dimensions;
  std::int64_t batch, in, out, size, kernel, stride, padding, dilation, groups;
  bool transposed = false;
  std::int64_t output_padding = 0;
};

const std::vector<Case> cases = {
    {"plain 1d", 1, 3, 4, 6, 9, 3, 1, 1, 1, 1},
    {"plain 2d", 2, 3, 4, 6, 7, 3, 1, 1, 1, 1},
    {"plain 3d", 3, 2, 4, 6, 4, 3, 1, 1, 1, 1},
    {"strided", 2, 3, 4, 6, 8, 3, 2, 1, 1, 1},
    {"strided, pixels left over", 2, 2, 4, 6, 8, 3, 3, 0, 1, 1},
    {"dilated", 2, 3, 4, 6, 9, 3, 1, 2, 2, 1},
    {"grouped", 2, 3, 4, 6, 7, 3, 1, 1, 1, 2},
    {"depthwise", 2, 3, 4, 4, 7, 3, 1, 1, 1, 4},
    {"depthwise, two outputs a channel", 2, 3, 4, 8, 7, 3, 2, 1, 1, 4},
    {"pointwise", 2, 3, 4, 6, 5, 1, 1, 0, 1, 1},
    // Input channels in eights: with others, in channels-last, LibTorch 2.13's convolution_backward (oneDNN) writes
    // beyond its memory on CPUs that have AVX2 and no AVX-512.
    {"pointwise, strided", 2, 3, 8, 16, 6, 1, 2, 0, 1, 1},
    {"pointwise, strided, grouped, pixels left over", 2, 3, 16, 32, 8, 1, 3, 0, 1, 2},
    {"1x1 map", 2, 3, 4, 6, 1, 3, 1, 1, 1, 1},
    {"batch of 1", 2, 1, 4, 6, 6, 3, 1, 1, 1, 1},
    {"one channel", 2, 2, 1, 1, 6, 3, 1, 1, 1, 1},
    {"many channels, 2x2 map", 2, 3, 64, 80, 2, 3, 1, 1, 1, 1},
    {"many channels, 1x1 map", 2, 5, 72, 64, 1, 3, 1, 1, 1, 1},
    {"many channels, strided", 2, 2, 64, 96, 7, 3, 2, 1, 1, 1},
    {"many channels, dilated", 2, 2, 80, 64, 6, 3, 2, 2, 2, 1},
    {"many channels, pointwise", 2, 3, 64, 64, 4, 1, 1, 0, 1, 1},
    {"many channels, grouped", 2, 3, 128, 128, 3, 3, 1, 1, 1, 2},
    {"many channels, transposed", 2, 3, 64, 64, 2, 3, 1, 1, 1, 1, true},
    {"sixteen channels", 2, 2, 16, 32, 6, 3, 1, 1, 1, 1},
    {"transposed", 2, 3, 4, 6, 5, 3, 1, 1, 1, 1, true},
    {"transposed, strided, output padding", 2, 3, 4, 6, 5, 3, 2, 1, 1, 1, true, 1},
    {"transposed, grouped", 2, 3, 4, 6, 5, 3, 2, 0, 1, 2, true},
    {"transposed 1d", 1, 3, 4, 6, 5, 3, 2, 1, 1, 1, true},
    {"transposed 3d", 3, 2, 4, 6, 3, 3, 2, 1, 1, 1, true, 1},
};

enum class Layout { contiguous, channels_last, strided };

torch::Tensor with_layout(torch::Tensor tensor, Layout layout) {
  if (layout == Layout::channels_last && tensor.dim() >= 4) {
    return tensor.contiguous(tensor.dim() == 4 ? torch::MemoryFormat::ChannelsLast
                                               : torch::MemoryFormat::ChannelsLast3d);
  }
  if (layout == Layout::strided) {
    return torch::stack({tensor, tensor}, -1).select(-1, 0);  // every other element of a larger tensor
  }
  return tensor;
}

std::vector<torch::Tensor> inputs_of(const Case& c, torch::Dtype type, Layout layout, bool bias,
                                     std::array<bool, 3> requires_grad) {
  torch::manual_seed(3);
  std::vector<std::int64_t> x_shape{c.batch, c.in};
  std::vector<std::int64_t> w_shape = c.transposed ? std::vector<std::int64_t>{c.in, c.out / c.groups}
                                                   : std::vector<std::int64_t>{c.out, c.in / c.groups};
  for (int d = 0; d < c.dimensions; ++d) {
    x_shape.push_back(c.size);
    w_shape.push_back(c.kernel);
  }
  std::vector<torch::Tensor> inputs{with_layout(torch::randn(x_shape, type), layout),
                                    with_layout(torch::randn(w_shape, type) * 0.3, layout)};
  if (bias) {
    inputs.push_back(torch::randn({c.out}, type));
  }
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    inputs[i] = inputs[i].detach().requires_grad_(requires_grad[i]);
  }
  return inputs;
}

Function convolution(const Case& c) {
  return [c](const std::vector<torch::Tensor>& in) {
    const std::vector<std::int64_t> stride(static_cast<std::size_t>(c.dimensions), c.stride);
    const std::vector<std::int64_t> padding(static_cast<std::size_t>(c.dimensions), c.padding);
    const std::vector<std::int64_t> dilation(static_cast<std::size_t>(c.dimensions), c.dilation);
    const std::vector<std::int64_t> output_padding(static_cast<std::size_t>(c.dimensions), c.output_padding);
    const auto bias = in.size() > 2 ? std::optional(in[2]) : std::nullopt;
    return at::convolution(in[0], in[1], bias, stride, padding, dilation, c.transposed, output_padding, c.groups);
  };
}

}  // namespace

TEST_CASE("fused convolution equals stock over geometries, layouts and types", "[fused]") {
  for (const Case& c : cases) {
    for (const torch::Dtype type : {torch::kFloat64, torch::kFloat32}) {
      for (const Layout layout : {Layout::contiguous, Layout::channels_last, Layout::strided}) {
        for (const bool bias : {true, false}) {
          INFO(c.name << ", " << type << ", layout " << static_cast<int>(layout) << ", bias " << bias);
          CHECK(fused_error(convolution(c), inputs_of(c, type, layout, bias, {true, true, true})) < tolerance(type));
        }
      }
    }
  }
}

TEST_CASE("fused convolution gives the gradients of any subset of its inputs", "[fused]") {
  for (const Case& c : cases) {
    if (c.name != "plain 2d" && c.name != "grouped" && c.name != "pointwise, strided" &&
        c.name != "many channels, 2x2 map" && c.name != "transposed") {
      continue;
    }
    for (const torch::Dtype type : {torch::kFloat64, torch::kFloat32}) {
      for (unsigned subset = 1; subset < 8; ++subset) {
        INFO(c.name << ", " << type << ", subset " << subset);
        const std::array<bool, 3> requires_grad{(subset & 1) != 0, (subset & 2) != 0, (subset & 4) != 0};
        CHECK(fused_error(convolution(c), inputs_of(c, type, Layout::contiguous, true, requires_grad)) <
              tolerance(type));
      }
    }
  }
}

TEST_CASE("the weight gradient by a matrix product is LibTorch's", "[fused]") {
  if (skipped_off_the_cpu("the product is made on the CPU alone")) {
    return;
  }
  torch::manual_seed(2);
  const torch::Tensor x = torch::randn({3, 64, 9, 4});
  const torch::Tensor weight = torch::randn({70, 64, 3, 2});
  const microreg::detail::PatchGeometry geometry{{2, 3}, {2, 1}, {2, 1}};
  const auto& [stride, padding, dilation] = geometry;
  const torch::Tensor y = at::convolution(x, weight, {}, stride, padding, dilation, false, {0, 0}, 1);
  const torch::Tensor dy = torch::randn_like(y);
  const torch::NoGradGuard no_grad;
  REQUIRE(microreg::detail::prefers_product(dy, x, weight));
  for (const Layout layout : {Layout::contiguous, Layout::channels_last, Layout::strided}) {
    const torch::Tensor exact =
        std::get<1>(at::convolution_backward(dy.to(torch::kFloat64), x.to(torch::kFloat64), weight.to(torch::kFloat64),
                                             {}, stride, padding, dilation, false, {0, 0}, 1, {false, true, false}));
    const torch::Tensor w = with_layout(weight, layout);
    const torch::Tensor ours =
        microreg::detail::weight_gradient_by_product(with_layout(dy, layout), with_layout(x, layout), w, geometry);
    CHECK(ours.suggest_memory_format() == w.suggest_memory_format());
    CHECK((ours - exact).norm().item<double>() < 1e-6 * exact.norm().item<double>());
  }
  CHECK_FALSE(
      microreg::detail::prefers_product(dy.to(torch::kFloat64), x.to(torch::kFloat64), weight.to(torch::kFloat64)));
  CHECK_FALSE(microreg::detail::prefers_product(torch::randn({64, 70, 4, 4}), torch::randn({64, 64, 4, 4}), weight));
  CHECK_FALSE(microreg::detail::prefers_product(dy, torch::randn({3, 128, 9, 4}), weight));  // two groups
}

TEST_CASE("a pointwise convolution with a stride of its own in each direction equals stock", "[fused]") {
  const Function function = [](const std::vector<torch::Tensor>& in) {
    return at::convolution(in[0], in[1], {}, {2, 3}, {0, 0}, {1, 1}, false, {0, 0}, 1);
  };
  for (const torch::Dtype type : {torch::kFloat64, torch::kFloat32}) {
    for (const Layout layout : {Layout::contiguous, Layout::channels_last, Layout::strided}) {
      INFO(type << ", layout " << static_cast<int>(layout));
      torch::manual_seed(4);
      const torch::Tensor x = with_layout(torch::randn({2, 8, 7, 8}, type), layout).requires_grad_();
      const torch::Tensor weight = torch::randn({16, 8, 1, 1}, type).requires_grad_();
      CHECK(fused_error(function, {x, weight}) < tolerance(type));
    }
  }
}

TEST_CASE("inside a scope, and only there, convolution's backward is ours", "[fused]") {
  const auto inputs = inputs_of(cases[1], torch::kFloat32, Layout::contiguous, true, {true, true, true});
  const Function function = convolution(cases[1]);
  CHECK(graph_has(second_derivatives(function, inputs, true).first, "microreg::aten::convolution_backward"));
  CHECK_FALSE(graph_has(second_derivatives(function, inputs, false).first, "microreg"));
}

TEST_CASE("third derivatives through a fused convolution are exact", "[fused]") {
  const auto inputs = inputs_of(cases[3], torch::kFloat64, Layout::contiguous, true, {true, true, true});
  CHECK(third_derivative_error(convolution(cases[3]), inputs) < 1e-6);
}

TEST_CASE("a step with weight gradients by one product is that of LibTorch's kernels, in both layouts", "[fused]") {
  for (const auto layout : {torch::MemoryFormat::Contiguous, torch::MemoryFormat::ChannelsLast}) {
    torch::manual_seed(1);
    torch::nn::Sequential model(torch::nn::Conv2d(torch::nn::Conv2dOptions(64, 64, 3).padding(1)), torch::nn::ReLU(),
                                torch::nn::Conv2d(torch::nn::Conv2dOptions(64, 96, 3).padding(1)), torch::nn::Flatten(),
                                torch::nn::Linear(96 * 4, 5));
    for (torch::Tensor& parameter : model->parameters()) {
      if (parameter.dim() == 4) {
        parameter.set_data(parameter.data().contiguous(layout));
      }
    }
    const torch::Tensor input = torch::randn({8, 64, 2, 2}).contiguous(layout);
    const torch::Tensor target = torch::randint(5, {8});
    std::vector<torch::Tensor> gradients;
    for (const bool fused : {false, true}) {
      model->zero_grad();
      microreg::Regularizer regularizer(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{},
                                        {.strength = 0.1, .micro_batch_size = 4, .fused = fused});
      (void)regularizer.backward(input, target);
      std::vector<torch::Tensor> parts;
      for (const torch::Tensor& parameter : model->parameters()) {
        parts.push_back(parameter.grad().to(torch::kFloat64).flatten());
      }
      gradients.push_back(torch::cat(parts));
    }
    CHECK((gradients[1] - gradients[0]).norm().item<double>() < 1e-5 * gradients[0].norm().item<double>());
  }
}
