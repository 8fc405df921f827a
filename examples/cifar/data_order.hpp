/// @file
/// Which samples each step trains on.
#pragma once

#include <torch/torch.h>

#include <cstdint>

namespace cifar {

/// Epochs in random order, joined end to end and cut into batches of equal size: a batch may begin in one epoch and end
/// in the next, so none is short. The batch of a step depends on the seed and the step alone.
class DataOrder {
 public:
  DataOrder(std::int64_t samples, std::int64_t batch_size, std::int64_t seed);

  /// Indices of the samples of `step`, counted from 0: int64 [batch_size], on the CPU.
  [[nodiscard]] torch::Tensor batch(std::int64_t step);

 private:
  const torch::Tensor& epoch(std::int64_t number);

  std::int64_t samples_;
  std::int64_t batch_size_;
  std::int64_t seed_;
  std::int64_t epoch_number_ = -1;
  torch::Tensor epoch_order_;
};

}  // namespace cifar
