/// @file
/// What may do a micro-batch's work in another way than operation by operation: RegularizerOptions::cuda_graph.
#pragma once

#include <microreg/step/exact.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/probes.hpp>
#include <microreg/step/snapshot.hpp>
#include <microreg/step/visitor.hpp>

namespace microreg::inline MICROREG_ABI::detail {

class Replay {
 public:
  Replay() = default;
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;
  virtual ~Replay() = default;

  /// What exact_estimate() would give. `beginning`: buffers and generators as they were before the step.
  [[nodiscard]] virtual Estimated estimate(const ExactTask& task, MiniBatch& batch, const Part& part,
                                           const Weights& weights, const Visitor& visitor,
                                           const Snapshot& beginning) = 0;
};

}  // namespace microreg::inline MICROREG_ABI::detail
