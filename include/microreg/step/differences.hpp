/// @file
/// What a step knows of an estimator that differentiates by differences.
#pragma once

#include <microreg/micro_batches.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/probes.hpp>
#include <microreg/step/snapshot.hpp>

#include <functional>
#include <vector>

namespace microreg::detail {

/// Estimates the penalty's gradient by displaced passes, for all micro-batches of one step.
class Differences {
 public:
  Differences() = default;
  Differences(const Differences&) = delete;
  Differences& operator=(const Differences&) = delete;
  virtual ~Differences() = default;

  /// Adds the gradient of one penalised micro-batch to `sums`. `keep(evaluation)` is shown the first pass before its
  /// graph goes. Returns the squared gradient norm of each penalty.
  virtual std::vector<at::Tensor> operator()(MiniBatch& batch, const Part& part, const Weights& weights,
                                             const Snapshot& snapshot, std::vector<at::Tensor>& sums,
                                             const std::function<void(Evaluation&)>& keep) = 0;
};

}  // namespace microreg::detail
