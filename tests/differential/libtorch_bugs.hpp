/// @file
/// What the random networks avoid because LibTorch itself gets it wrong; docs/libtorch-bugs.md has them with versions.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <vector>

namespace differential::libtorch_bugs {

/// convolution_backward in float32 of a pointwise strided convolution in channels-last writes beyond its memory on CPUs
/// that have AVX2 and no AVX-512, unless the input's channels come in eights, or the output's of a transposed one.
inline bool pointwise_strided_convolution(const std::vector<std::int64_t>& weight,
                                          const std::vector<std::int64_t>& stride) {
  const auto all = [](auto begin, auto end, std::int64_t one) {
    return std::all_of(begin, end, [one](std::int64_t value) { return value == one; });
  };
  return all(weight.begin() + 2, weight.end(), 1) && !all(stride.begin(), stride.end(), 1);
}

/// The backward of group_norm that does not need its input's gradient fails on a channels-last input. Whether it needs
/// it depends on what is asked for: `group_norm` of a contiguous input, in the layout of `x`, by which dropout draws.
template <class GroupNorm>
torch::Tensor group_normalised(const torch::Tensor& x, const GroupNorm& group_norm) {
  return group_norm(x.clone(torch::MemoryFormat::Contiguous)).contiguous(x.suggest_memory_format());
}

/// Batch normalisation over a dimension of one element, and so instance normalisation with a batch of one: the backward
/// pass of a gradient that lies otherwise than the input, which those strides do not tell. `y` with a hook that lays it
/// out as `x`.
inline torch::Tensor normalised(torch::Tensor y, const torch::Tensor& x) {
  const auto sizes = x.sizes();
  if (y.requires_grad() && std::find(sizes.begin(), sizes.end(), 1) != sizes.end() &&
      x.is_non_overlapping_and_dense()) {
    y.register_hook([sizes = sizes.vec(), strides = x.strides().vec()](const torch::Tensor& g) {
      return torch::empty_strided(sizes, strides, g.options().requires_grad(false)).copy_(g);
    });
  }
  return y;
}

/// Max pooling with dilation whose window has all of its elements in the padding: the index of its maximum lies outside
/// the map, and the backward pass writes there. Its value is minus infinity; throws for such a `y`.
inline torch::Tensor pooled(torch::Tensor y) {
  TORCH_CHECK(!y.isneginf().any().item<bool>(), "a window without an element");
  return y;
}

/// The second derivative of torch::_weight_norm holds the norms constant. Its values in its layout, by which dropout
/// draws, bit by bit, so that a maximum over what comes of them is where it is for others.
inline torch::Tensor weight_norm(const torch::Tensor& v, const torch::Tensor& g) {
  const torch::Tensor w = v * (g / v.flatten(1).norm(2, 1).view_as(g));
  return torch::_weight_norm(v.detach(), g.detach(), 0) + (w - w.detach());
}

/// torch::hardsigmoid has no second derivative, and for a first one in float64 the float32 nearest to 1/6.
inline torch::Tensor hardsigmoid(const torch::Tensor& x) {
  const torch::Tensor y = (x + 3).clamp(0, 6);
  return (y / 6).detach() + (y - y.detach()) * static_cast<double>(1.0F / 6.0F);
}

}  // namespace differential::libtorch_bugs
