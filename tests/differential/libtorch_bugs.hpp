/// @file
/// What the random networks avoid because LibTorch itself gets it wrong; docs/libtorch-bugs.md has them with versions.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <vector>

namespace differential::libtorch_bugs {

/// convolution_backward in float32 of a pointwise strided convolution in channels-last writes beyond its memory on CPUs
/// that have AVX2 and no AVX-512, unless the channels come in eights.
inline bool pointwise_strided_convolution(const std::vector<std::int64_t>& weight,
                                          const std::vector<std::int64_t>& stride, bool transposed) {
  const auto all = [](auto begin, auto end, std::int64_t one) {
    return std::all_of(begin, end, [one](std::int64_t value) { return value == one; });
  };
  return !transposed && all(weight.begin() + 2, weight.end(), 1) && !all(stride.begin(), stride.end(), 1);
}

/// The backward of group_norm that does not need its input's gradient fails on a channels-last input.
inline torch::Tensor input_of_group_norm(const torch::Tensor& x) { return x.requires_grad() ? x : x.contiguous(); }

/// Batch normalisation of one sample, and so instance normalisation with a batch of one: the backward pass in
/// channels-last of a gradient whose stride between samples is not that of a whole one. `y` with a hook that makes it
/// contiguous, strides of dimensions of one element too.
inline torch::Tensor normalised_sample(torch::Tensor y) {
  if (y.size(0) == 1 && y.requires_grad()) {
    y.register_hook(
        [](const torch::Tensor& g) { return torch::empty(g.sizes(), g.options().requires_grad(false)).copy_(g); });
  }
  return y;
}

/// Max pooling with dilation whose window has all of its elements in the padding: the index of its maximum lies outside
/// the map, and the backward pass writes there. Its value is minus infinity; throws for such a `y`.
inline torch::Tensor pooled(torch::Tensor y) {
  TORCH_CHECK(!y.isneginf().any().item<bool>(), "a window without an element");
  return y;
}

/// The second derivative of torch::_weight_norm holds the norms constant.
inline torch::Tensor weight_norm(const torch::Tensor& v, const torch::Tensor& g) {
  return v * (g / v.flatten(1).norm(2, 1).view_as(g));
}

/// torch::hardsigmoid has no second derivative, and for a first one in float64 the float32 nearest to 1/6.
inline torch::Tensor hardsigmoid(const torch::Tensor& x) {
  const torch::Tensor y = (x + 3).clamp(0, 6);
  return (y / 6).detach() + (y - y.detach()) * static_cast<double>(1.0F / 6.0F);
}

}  // namespace differential::libtorch_bugs
