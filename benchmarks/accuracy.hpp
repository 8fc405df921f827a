/// @file
/// How far an estimator's gradient is from the exact one.
#pragma once

#include "penalised_step.hpp"

namespace overhead {

/// Compares penalised steps on one workload with the exact one by stock LibTorch, in the penalty's part of the
/// gradient: what the step adds to the gradient of the loss.
class Accuracy {
 public:
  /// `reference` is the exact step without any fused kernel.
  Accuracy(const Workload& workload, const PenalisedStep& reference);

  /// || part - reference || / || reference ||, over all parameters jointly, with the same labels and directions drawn.
  [[nodiscard]] double relative_error(const PenalisedStep& step) const;

 private:
  [[nodiscard]] torch::Tensor penalty_part(const PenalisedStep& step) const;

  Workload workload_;
  torch::Tensor loss_gradient_;
  torch::Tensor reference_;
};

}  // namespace overhead
