/// @file
/// RecordGates and ReplayGates: a finite difference between two points with the same gates.
///
///     microreg::GateTape tape;
///     {
///       const microreg::RecordGates record(tape);
///       loss_there = loss(network);  // the first forward pass: stock results, bit by bit
///     }
///     // ... move the parameters a little ...
///     {
///       const microreg::ReplayGates replay(tape, microreg::Keep::no);
///       loss_here = loss(network);  // the second: every unit as in the first
///       replay.finish();
///     }
///
/// Between the two points the network is smooth then, and differences of its gradient converge to the product of
/// Hessian and direction that double backward computes. Backward passes may run inside of the scopes or outside.
///
/// Gates have decisions: comparisons, signs and roundings, argmax, the indices of sort, topk, kthvalue, median, mode,
/// cummax and of a maximum over a dimension, searchsorted, conversions to integers; detach() and item(), which double
/// backward takes for constants; and so whatever is composed of them. And operations that hide a decision: relu and its
/// family, clamp, abs, maxima and minima of every kind, max pooling of every kind, remainders, fake quantisation, norms
/// and distances of order 1 and infinity, smooth_l1, huber and margin losses. In place as out of place. Refused by name
/// (GateError): grid_sample with a grid that requires a gradient, renorm, embedding_bag's maximum, segment_reduce's
/// extrema, a fused recurrent ReLU network, learnable quantisation, _foreach operations with a kink.
///
/// Draws that choose (bernoulli, multinomial, poisson, rrelu's slopes) are decisions too. Dropout, rand and randn draw
/// anew: put the generator back before a replay. An estimator does not, since other threads may draw from it: its own
/// sessions hold whatever is drawn.
///
/// Not seen: other threads, scripted graphs, a custom function's own backward, forward passes that run within a
/// backward pass (checkpointing): see gates/unseen.hpp. Nor what runs without a graph on moved parameters, but for its
/// decisions; an estimator's own sessions hold what comes of that into the graph again (gates/constants.hpp), and the
/// projection of an Embedding's max_norm.
#pragma once

#include <microreg/detail/interception.hpp>
#include <microreg/gates/tape.hpp>

#include <utility>

#if defined(MICROREG_COMPILED)
namespace microreg::inline MICROREG_ABI::detail {
GateSession*& gate_session_of_kernels();
}  // namespace microreg::inline MICROREG_ABI::detail
#else
#include <microreg/gates/registration.hpp>
#endif

namespace microreg::inline MICROREG_ABI {

namespace detail {

/// Makes a session this thread's while it lives, and the one before it afterwards.
class GateScope {
 public:
  GateScope(GateTape& tape, GateSession::Pass pass, Keep keep, Frozen frozen = Frozen::decisions)
      : active_(gate_session_of_kernels()), session_(tape, pass, keep, frozen), previous_(active_) {
    active_ = &session_;
  }
  GateScope(const GateScope&) = delete;
  GateScope& operator=(const GateScope&) = delete;
  ~GateScope() { active_ = previous_; }

  [[nodiscard]] const GateSession& session() const noexcept { return session_; }

 private:
  GateSession*& active_;  // first: the kernels are registered before the key is included
  GateSession session_;
  GateSession* previous_;
  Interception interception_;
};

}  // namespace detail

/// While it lives, forward passes on this thread write their gates to the tape, which is emptied first. The results
/// are LibTorch's, bit by bit. Scopes nest: the innermost one holds. Throws Error, as ReplayGates does, where another
/// version of microreg has intercepted LibTorch's operations in this process.
class RecordGates {
 public:
  /// Empties the tape, which must outlive the scope.
  explicit RecordGates(GateTape& tape) : scope_(tape, detail::GateSession::Pass::record, Keep::yes) {}

 private:
  detail::GateScope scope_;
};

/// While it lives, a forward pass on this thread takes its gates from the tape. A pass that does not repeat the
/// recorded one throws GateError.
class ReplayGates {
 public:
  /// Begins with the first operation of the tape, which must outlive the scope.
  ReplayGates(GateTape& tape, Keep keep) : scope_(tape, detail::GateSession::Pass::replay, keep) {}

  /// Throws GateError if the first pass had more operations than this one.
  void finish() const { scope_.session().finish(); }

 private:
  detail::GateScope scope_;
};

}  // namespace microreg::inline MICROREG_ABI
