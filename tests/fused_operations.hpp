/// @file
/// The fused operations, each as a problem with a reference in float64 on the CPU: the derivatives of its backward, in
/// any type and layout, on any device.
#pragma once

#include "fused_helpers.hpp"

#include <cstdint>
#include <string>
#include <vector>

namespace helpers {

struct FusedOperation {
  std::string name;
  Function function;
  std::vector<std::vector<std::int64_t>> shapes;  // of the inputs
  bool mixed = false;  // whether all but the first stay in float32 beside a half type, as weights under Autocast do
  bool normalises = false;    // so that the input may be far from zero
  bool everywhere = true;     // fused on every device, not on the CPU alone
  bool on_cpu_alone = false;  // LibTorch itself refuses it elsewhere

  [[nodiscard]] bool runs_on(at::Device device) const { return !on_cpu_alone || device.is_cpu(); }
  [[nodiscard]] bool is_fused_on(at::Device device) const { return everywhere || device.is_cpu(); }
};

inline const std::vector<FusedOperation> fused_operations = [] {
  using Inputs = std::vector<torch::Tensor>;
  const auto batch_norm = [](bool by_cudnn) {
    return [by_cudnn](const Inputs& in) {
      return torch::batch_norm(in[0], in[1], in[2], {}, {}, true, 0.1, 1e-5, by_cudnn);
    };
  };
  const Function layer_norm = [](const Inputs& in) { return torch::layer_norm(in[0], {16}, in[1], in[2]); };
  return std::vector<FusedOperation>{
      {.name = "convolution",
       .function = [](const Inputs& in) { return torch::conv2d(in[0], in[1], in[2], 1, 1); },
       .shapes = {{3, 4, 6, 6}, {5, 4, 3, 3}, {5}}},
      {.name = "strided pointwise convolution",
       .function = [](const Inputs& in) { return torch::conv2d(in[0], in[1], {}, 2); },
       .shapes = {{3, 4, 6, 6}, {5, 4, 1, 1}}},
      {.name = "depthwise convolution",
       .function = [](const Inputs& in) { return torch::conv2d(in[0], in[1], {}, 1, 1, 1, 4); },
       .shapes = {{3, 4, 6, 6}, {4, 1, 3, 3}}},
      {.name = "batch_norm", .function = batch_norm(true), .shapes = {{6, 4, 5, 5}, {4}, {4}}, .normalises = true},
      {.name = "batch_norm without cuDNN",
       .function = batch_norm(false),
       .shapes = {{6, 4, 5, 5}, {4}, {4}},
       .normalises = true},
      {.name = "batch_norm, float32 weights",
       .function = batch_norm(true),
       .shapes = {{6, 4, 5, 5}, {4}, {4}},
       .mixed = true},
      {.name = "layer_norm", .function = layer_norm, .shapes = {{9, 16}, {16}, {16}}, .normalises = true},
      {.name = "layer_norm, float32 weights",
       .function = layer_norm,
       .shapes = {{9, 16}, {16}, {16}},
       .mixed = true,
       .on_cpu_alone = true},
      {.name = "group_norm",
       .function = [](const Inputs& in) { return torch::group_norm(in[0], 2, in[1], in[2]); },
       .shapes = {{3, 4, 5, 5}, {4}, {4}},
       .normalises = true},
      {.name = "softmax",
       .function = [](const Inputs& in) { return torch::softmax(in[0], -1); },
       .shapes = {{5, 11}},
       .everywhere = false},
      {.name = "gelu", .function = [](const Inputs& in) { return torch::gelu(in[0]); }, .shapes = {{5, 11}}},
      {.name = "relu", .function = [](const Inputs& in) { return torch::relu(in[0]) * in[0]; }, .shapes = {{5, 11}}},
      {.name = "max_pool2d",
       .function = [](const Inputs& in) { return torch::max_pool2d(in[0], 2) * 1.5; },
       .shapes = {{2, 3, 6, 6}}},
  };
}();

/// In what a problem is computed.
struct Setting {
  torch::Dtype type = torch::kFloat64;
  at::Device device = test_device();
  at::MemoryFormat layout = at::MemoryFormat::Contiguous;
};

/// The numbers of one operation, drawn once, rounded to `type`, and kept in float64 for the reference.
class DoubleBackward {
 public:
  DoubleBackward(const FusedOperation& of, torch::Dtype type, double offset = 0)
      : of_(of), type_(type), offset_(offset) {
    torch::manual_seed(5);
    const auto draw = [&](const std::vector<std::int64_t>& shape, double middle = 0) {
      return (torch::randn(shape, torch::kFloat64) + middle).to(type).to(torch::kFloat64);
    };
    for (const auto& shape : of.shapes) {
      inputs_.push_back(draw(shape, inputs_.empty() ? offset : 0));
      seeds_.push_back(draw(shape));
    }
    dy_ = draw(of.function(inputs_).sizes().vec());
  }

  /// The derivatives of sum <gradient of input i, seed i> by dy and the inputs, all in one vector of float64. `ours`:
  /// whether a node of ours is in the graph.
  [[nodiscard]] torch::Tensor operator()(const Setting& in, bool fused, bool* ours = nullptr) const {
    const microreg::FusedScope scope(fused);
    const auto put = [&](const torch::Tensor& tensor, torch::Dtype type) {
      const torch::Tensor there = tensor.to(in.device, type);
      return there.dim() == 4 ? there.contiguous(in.layout) : there;
    };
    std::vector<torch::Tensor> leaves, directions;
    for (std::size_t i = 0; i < inputs_.size(); ++i) {
      const torch::Dtype type = in.type == type_ && of_.mixed && i > 0 ? torch::kFloat32 : in.type;
      leaves.push_back(put(inputs_[i], type).detach().requires_grad_());
      directions.push_back(put(seeds_[i], type));
    }
    const torch::Tensor dy = put(dy_, in.type).detach().requires_grad_();
    const torch::Tensor y = of_.function(leaves);
    const auto first = torch::autograd::grad({y}, leaves, {dy.to(y.scalar_type())}, true, true);
    if (ours != nullptr) {
      *ours = graph_has(first, "microreg");
    }
    std::vector<torch::Tensor> by = leaves;
    by.push_back(dy);
    const auto second = torch::autograd::grad(first, by, directions, false, false, true);
    std::vector<torch::Tensor> parts;
    for (std::size_t i = 0; i < by.size(); ++i) {
      const torch::Tensor part = second[i].defined() ? second[i] : torch::zeros_like(by[i]);
      CHECK(part.scalar_type() == by[i].scalar_type());
      parts.push_back(part.to(torch::kCPU, torch::kFloat64).flatten());
    }
    return torch::cat(parts);
  }

  /// By LibTorch in float64. What is normalised does not depend on the offset, whose mean float64 rounds as well.
  [[nodiscard]] torch::Tensor exact() const {
    DoubleBackward centred = *this;
    if (of_.normalises) {
      centred.inputs_[0] = inputs_[0] - offset_;
    }
    return centred({.device = at::kCPU}, false);
  }

 private:
  const FusedOperation& of_;
  torch::Dtype type_;
  double offset_;
  std::vector<torch::Tensor> inputs_, seeds_;
  torch::Tensor dy_;
};

}  // namespace helpers
