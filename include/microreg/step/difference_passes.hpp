/// @file
/// What a difference knows of one micro-batch from its first pass to its last.
#pragma once

#include <ATen/core/Tensor.h>
#include <microreg/difference.hpp>
#include <microreg/gates/scope.hpp>
#include <microreg/gates/tape.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/probes.hpp>
#include <microreg/step/snapshot.hpp>
#include <microreg/step/suspects.hpp>
#include <microreg/step/visitor.hpp>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// ForwardDifference or CentralDifference.
struct DifferenceSettings {
  double step;
  Gates gates;
  bool central;
  std::int64_t check_every;
  double tolerance;
  OwnFunctions own_functions;
  Displace displace;

  [[nodiscard]] Frozen frozen() const { return gates == Gates::frozen ? Frozen::all : Frozen::draws; }
};

/// The distance between two neighbours of 1 in the type that a value is computed in.
inline double epsilon_of(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return std::numeric_limits<double>::epsilon();
    case at::kHalf:
      return 0x1p-10;
    case at::kBFloat16:
      return 0x1p-7;
    default:
      return std::numeric_limits<float>::epsilon();
  }
}

/// One probe in the first pass.
struct DifferenceProbe {
  at::Tensor value;                   // s itself
  std::vector<at::Tensor> gradient;   // by all parameters; empty where the penalty has strength 0
  std::vector<at::Tensor> direction;  // g: by what counts; undefined where the probe does not depend on it
  at::Tensor squared_norm;            // of g
  bool is_loss = false;
  bool brings_loss = false;  // its displaced pass adds the loss gradient too
};
/// One penalty in the first pass.
struct DifferenceTerm {
  std::vector<DifferenceProbe> probes;
  at::Tensor squared_norm;
  Draws draws;
  std::unique_ptr<GateTape> gates = std::make_unique<GateTape>();  // of the probes, which not every further pass makes
  std::size_t left = 0;                                            // further passes
};
/// One micro-batch.
struct DifferencePasses {
  MiniBatch& batch;
  const Part& part;
  const Weights& weights;
  const Snapshot& snapshot;  // of the step
  Calls& calls;
  Snapshot before;
  GateTape gates;  // of forward pass and loss
  std::vector<DifferenceTerm> terms;
  std::vector<at::Tensor> inputs;
  std::size_t left;               // further passes
  bool due;                       // a proof is
  bool far = false;               // a displaced probe was not where it should be
  double loss_gradient_norm = 0;  // where a proof is due
  Suspects suspects = {};         // likewise
};

/// What `evaluate()` returns, with its gates written to a tape.
template <class Evaluate>
auto recorded(GateTape& gates, Frozen frozen, const Evaluate& evaluate) {
  const GateScope scope(gates, GateSession::Pass::record, microreg::Keep::yes, frozen);
  return evaluate();
}

/// The same with the gates of the tape.
template <class Evaluate>
auto replayed(GateTape& gates, Frozen frozen, bool last, const Evaluate& evaluate) {
  const GateScope scope(gates, GateSession::Pass::replay, last ? microreg::Keep::no : microreg::Keep::yes, frozen);
  auto result = evaluate();
  scope.session().finish();
  return result;
}

/// A pass behind the first: the right to call the model, where buffers are what the first pass found.
class FurtherPass {
 public:
  explicit FurtherPass(DifferencePasses& passes)
      : before_(passes.before), again_(std::in_place, passes.calls), now_(passes.snapshot.buffers_now()) {
    before_.restore_buffers();
  }

  /// Puts buffers back to what others have made of them, who may call then.
  void end() {
    now_.restore_buffers_over(before_);
    again_.reset();
  }

 private:
  const Snapshot& before_;
  std::optional<Calls::Again> again_;
  Snapshot now_;
};

/// At the first point, where decisions are made again by themselves.
template <class Evaluate>
auto repeated(GateTape& gates, const Evaluate& evaluate) {
  const GateScope scope(gates, GateSession::Pass::replay, microreg::Keep::yes, Frozen::draws);
  return evaluate();
}

}  // namespace microreg::inline MICROREG_ABI::detail
