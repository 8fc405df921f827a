/// @file
/// Random networks as functions of their parameters and buffers, so that the same one can be computed in any type.
#pragma once

#include "random.hpp"

#include <torch/torch.h>

#include <functional>
#include <string>
#include <vector>

namespace differential {

using torch::Tensor;
using Tensors = std::vector<Tensor>;

/// What the layers of a network read, and the running statistics that they write.
struct State {
  Tensors parameters, buffers;
  bool by_libtorch = false;  // what LibTorch's own passes get wrong is avoided
  bool by_hand = false;      // composed of operations whose second derivative LibTorch gets right
};

using Layer = std::function<Tensor(const Tensor& x, const State& state)>;

/// What the dimensions behind the samples are.
enum class Kind { features, sequence, map };

struct Network {
  Tensor input;  // of two samples, in float64, or int64 for tokens
  State state;   // in float64
  std::vector<Layer> layers;
  std::string description;
  Kind kind = Kind::features;  // of the output
  std::int64_t classes = 0;    // [M, classes, ...]
  std::int64_t outputs = 0;    // values for each sample
  bool stock_refuses = false;  // LibTorch has no second derivative, or a wrong one, which microreg refuses

  [[nodiscard]] Tensor operator()(const Tensor& x, const State& of) const;
};

/// Throws nothing: a layer that does not fit is left out.
[[nodiscard]] Network random_network(Random& random);

}  // namespace differential
