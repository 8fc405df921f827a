/// @file
/// The statistics of a normalisation as functions of its input.
#pragma once

#include <ATen/ATen.h>

#include <utility>

namespace microreg::detail {

/// Mean and 1 / sqrt(var + epsilon) of x over `dims`, with a graph. The values are those that the forward pass saved,
/// of which `rstd` tells epsilon. A third derivative needs them: LibTorch's own takes the saved ones for constants, and
/// is wrong without a word.
inline std::pair<at::Tensor, at::Tensor> differentiable_statistics(const at::Tensor& x, at::IntArrayRef dims,
                                                                   const at::Tensor& rstd) {
  const at::Tensor var = x.var(dims, /*unbiased=*/false);
  const at::Tensor epsilon = (rstd.pow(-2) - var).detach();
  return {x.mean(dims), (var + epsilon).rsqrt()};
}

}  // namespace microreg::detail
