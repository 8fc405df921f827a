/// @file
/// What a step knows of an estimator that differentiates by differences.
#pragma once

#include <c10/core/ScalarType.h>
#include <microreg/check_finite.hpp>
#include <microreg/micro_batches.hpp>
#include <microreg/parameters.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/probes.hpp>
#include <microreg/step/snapshot.hpp>
#include <microreg/step/visitor.hpp>

#include <optional>
#include <vector>

namespace microreg::inline MICROREG_ABI {
class Estimator;
}  // namespace microreg::inline MICROREG_ABI

namespace microreg::inline MICROREG_ABI::detail {

/// What a step asks for. `proof` is written to. `fused`: double backward, where it is needed, by the faster formulas.
/// `looks`: when values may be read, as the step does for NaN and infinity. `autocast`: the step's.
struct DifferenceRequest {
  const Estimator& estimator;
  const Parameters& parameters;
  Proof& proof;
  bool fused;
  CheckFinite looks;
  std::optional<at::ScalarType> autocast;
};

/// Estimates the penalty's gradient by displaced passes, for all micro-batches of one step.
class Differences {
 public:
  Differences() = default;
  Differences(const Differences&) = delete;
  Differences& operator=(const Differences&) = delete;
  virtual ~Differences() = default;

  /// Adds the gradient of one penalised micro-batch to `sums`. Returns the squared gradient norm of each penalty. May
  /// be called for the next micro-batch, by another thread, as soon as this one has left visitor.calls; nothing is
  /// displaced then that others see.
  virtual std::vector<at::Tensor> operator()(MiniBatch& batch, const Part& part, const Weights& weights,
                                             const Snapshot& snapshot, std::vector<at::Tensor>& sums,
                                             const Visitor& visitor) = 0;
  /// To be called once, when all micro-batches are through.
  virtual void finish() = 0;
};

}  // namespace microreg::inline MICROREG_ABI::detail
