/// @file
/// CountedLoss: a loss whose mean is not over samples.
#pragma once

#include <ATen/core/Tensor.h>
#include <microreg/version.hpp>

namespace microreg::inline MICROREG_ABI {

/// What a loss returns whose mean is not over samples (tokens, labels that are not ignored, class weights): L_M is
/// sum / count, and the micro-batches count by their `count` instead of their samples, so that the loss of the step is
/// that of the whole mini-batch, all sums over all counts. Reading a count from a CUDA device waits for it.
///
/// ```cpp
/// auto loss = [](const torch::Tensor& o, const torch::Tensor& y) {
///   return microreg::CountedLoss{torch::nll_loss(o, y, {}, at::Reduction::Sum, -100), (y != -100).sum()};
/// };
/// ```
struct CountedLoss {
  at::Tensor sum;    ///< a scalar with a graph
  at::Tensor count;  ///< a scalar, at least 0
};

}  // namespace microreg::inline MICROREG_ABI
