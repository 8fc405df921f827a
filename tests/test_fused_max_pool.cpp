// Double backward of max pooling inside a FusedScope against LibTorch's own.
#include "fused_helpers.hpp"

#include <utility>

using namespace helpers;

namespace {

struct Case {
  std::vector<std::int64_t> shape;
  std::int64_t kernel, stride, padding, dilation;
  bool ceil = false;
};

const std::vector<Case> cases = {
    {{3, 5, 8, 6}, 2, 2, 0, 1},       {{2, 17, 9, 9}, 3, 2, 1, 1}, {{2, 3, 9, 7}, 3, 1, 1, 2},
    {{2, 4, 7, 7}, 2, 2, 0, 1, true}, {{1, 1, 4, 4}, 2, 2, 0, 1},  {{2, 64, 2, 2}, 2, 2, 0, 1},
};

Function pooling(const Case& c) {
  return [c](const std::vector<torch::Tensor>& in) {
    return torch::max_pool2d(in[0] + 0.1 * in[0].pow(2), c.kernel, c.stride, c.padding, c.dilation, c.ceil);
  };
}

std::vector<torch::Tensor> input_of(const Case& c, torch::Dtype type, torch::MemoryFormat format) {
  torch::manual_seed(5);
  return {torch::randn(c.shape, type).contiguous(format).requires_grad_()};
}

}  // namespace

TEST_CASE("fused max pooling equals stock over geometries, layouts and types", "[fused]") {
  for (const Case& c : cases) {
    for (const torch::Dtype type : {torch::kFloat64, torch::kFloat32}) {
      for (const auto format : {torch::MemoryFormat::Contiguous, torch::MemoryFormat::ChannelsLast}) {
        INFO("shape " << c.shape << ", kernel " << c.kernel << ", " << type << ", " << format);
        CHECK(fused_error(pooling(c), input_of(c, type, format)) < tolerance(type));
      }
    }
  }
}

TEST_CASE("fused max pooling equals stock in 1d, in 3d and without a batch", "[fused]") {
  const std::vector<std::pair<std::vector<std::int64_t>, Function>> others = {
      {{2, 3, 11}, [](const std::vector<torch::Tensor>& in) { return torch::max_pool1d(in[0].pow(2), 3, 2, 1); }},
      {{5, 8, 6}, [](const std::vector<torch::Tensor>& in) { return torch::max_pool2d(in[0].pow(2), 2); }},
      {{2, 3, 5, 6, 7}, [](const std::vector<torch::Tensor>& in) { return torch::max_pool3d(in[0].pow(2), 2, 1); }},
      {{3, 5, 6, 7}, [](const std::vector<torch::Tensor>& in) { return torch::max_pool3d(in[0].pow(2), 3, 2, 1); }},
  };
  for (const auto& [shape, function] : others) {
    for (const torch::Dtype type : {torch::kFloat64, torch::kFloat32}) {
      INFO("shape " << shape << ", " << type);
      torch::manual_seed(5);
      const std::vector<torch::Tensor> input{torch::randn(shape, type).requires_grad_()};
      CHECK(fused_error(function, input) < tolerance(type));
      CHECK(graph_has(second_derivatives(function, input, true).first, "microreg::aten::max_pool"));
    }
  }
}

TEST_CASE("inside a scope max pooling is ours, outside LibTorch's", "[fused]") {
  const auto is_ours = [](torch::MemoryFormat format, bool fused) {
    const auto derivatives = second_derivatives(pooling(cases[0]), input_of(cases[0], torch::kFloat32, format), fused);
    return graph_has(derivatives.first, "microreg::aten::max_pool");
  };
  for (const auto format : {torch::MemoryFormat::Contiguous, torch::MemoryFormat::ChannelsLast}) {
    CHECK(is_ours(format, true));
    CHECK_FALSE(is_ours(format, false));
  }
}

TEST_CASE("third derivatives through fused max pooling are exact", "[fused]") {
  const auto input = input_of(cases[0], torch::kFloat64, torch::MemoryFormat::ChannelsLast);
  CHECK(third_derivative_error(pooling(cases[0]), input) < 1e-6);
}
