/// @file
/// Differentiation of penalties by differences of first derivatives, with or without frozen gates.
#pragma once

#include <ATen/ATen.h>
#include <ATen/SequenceNumber.h>
#include <c10/util/Exception.h>
#include <microreg/detail/substitution.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/difference.hpp>
#include <microreg/error.hpp>
#include <microreg/fused/scope.hpp>
#include <microreg/parameters.hpp>
#include <microreg/step/comparison.hpp>
#include <microreg/step/difference_passes.hpp>
#include <microreg/step/difference_proof.hpp>
#include <microreg/step/differences.hpp>
#include <microreg/step/displacement.hpp>
#include <microreg/step/displacement_length.hpp>
#include <microreg/step/double_backward.hpp>
#include <microreg/step/first_pass.hpp>
#include <microreg/step/gradients.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/probe_watch.hpp>
#include <microreg/step/probes.hpp>
#include <microreg/step/snapshot.hpp>
#include <microreg/step/suspects.hpp>
#include <microreg/step/tensor_lists.hpp>
#include <microreg/step/untouched.hpp>
#include <microreg/step/visitor.hpp>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <limits>
#include <new>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// The first pass over a micro-batch gives the loss gradient and, for each probe s, its gradient g by what the penalty
/// counts (parameters or input) and its gradient by all parameters. Each further pass, at a point displaced along g,
/// gives the gradient of s by all parameters there; the difference over the displacement is the second derivative along
/// g. For GradientNorm all of the first pass is one backward pass. The further passes get the random numbers that the
/// first drew and see the same buffers, and leave no trace: parameters, buffers and generators are afterwards what one
/// pass leaves.
///
/// Two things are watched. In each displaced pass, s must have changed by what its gradients at both ends say, which
/// is off by orders of magnitude where the passes do not share noise or state. Where it is not so on the CPU, and a
/// pass at the first point repeats the first, the change was lost in rounding: the micro-batch is differentiated
/// exactly then. And where a proof is due, all of the penalties' gradient is compared with double backward.
class FiniteDifference final : public Differences {
 public:
  FiniteDifference(const DifferenceSettings& settings, const DifferenceRequest& request)
      : settings_(settings),
        parameters_(request.parameters),
        proof_(request.proof),
        fused_(request.fused),
        autocast_(request.autocast),
        first_pass_(settings, request.parameters),
        displacements_(settings, request.parameters, request.proof, request.looks),
        terms_(settings, request.parameters, request.proof),
        watch_(request.parameters, request.looks) {}

  std::vector<at::Tensor> operator()(MiniBatch& batch, const Part& part, const Weights& weights,
                                     const Snapshot& snapshot, std::vector<at::Tensor>& sums,
                                     const Visitor& visitor) override {
    const Untouched untouched(batch, parameters_);
    DifferencePasses passes{.batch = batch,
                            .part = part,
                            .weights = weights,
                            .snapshot = snapshot,
                            .calls = visitor.calls,
                            .before = snapshot.buffers_now(),
                            .gates = {},
                            .terms = std::vector<DifferenceTerm>(batch.terms()),
                            .inputs = {},
                            .left = 0,
                            .due = terms_.is_due(weights, displacements_.moved_norm())};
    const bool differs = ProofTerms::differs(weights);
    const auto go_on = [&](const Evaluation& evaluation, const auto& probes, bool through_first) {
      if (differs) {
        untouched.require(passes.gates);
        displacements_.prepare(batch, weights);
      }
      visitor.go_on(evaluation, probes, through_first);
    };
    first_pass_(passes, sums, differs, {visitor.calls, visitor.begin, visitor.keep, go_on});
    for (std::size_t i = 0; i < passes.terms.size(); ++i) {
      const std::size_t probes = passes.terms[i].probes.size();
      passes.terms[i].left = weights.strengths[i] > 0 ? probes * (settings_.central ? 2 : 1) : 0;
      passes.left += passes.terms[i].left;
    }
    if (passes.left > 0) {
      if (normalises_few(passes)) {
        add_of_few(passes, sums);
      } else if (passes.due) {
        add_proven(passes, sums);
      } else {
        add_penalties(passes, 1, sums);
      }
      differs_ = true;
    }
    std::vector<at::Tensor> squared_norms;
    for (const DifferenceTerm& term : passes.terms) {
      squared_norms.push_back(term.squared_norm);
    }
    return squared_norms;
  }

  void finish() override { proof_.since += differs_ ? 1 : 0; }

 private:
  /// How far a probe is displaced, and what the difference of its gradients counts.
  struct Distance {
    at::Tensor per_norm;  // e: what is displaced moves by e g
    at::Tensor scale;     // weights.penalty * strength * dR/dg over e
  };

  Distance distance(const DifferencePasses& passes, std::size_t index, const DifferenceProbe& probe, double times) {
    const TermInfo& info = passes.batch.term(index);
    const double factor = passes.weights.strengths[index] * passes.weights.penalty;
    const at::Tensor length = displacements_.length(info, passes.inputs, probe) * times;
    // dR/dg over e: 2 ||g|| / length, or, for an unsquared norm, that over 2 R.
    const at::Tensor slope = probe.squared_norm.sqrt() / length;
    return {over_norm(probe.squared_norm, 1.0) * length,
            info.squared ? slope * (2 * factor) : slope * over_norm(passes.terms[index].squared_norm, factor)};
  }

  /// Adds weights.penalty * strength * grad R_M of all penalties, one displaced pass (or two) a probe, with
  /// displacements `times` as long.
  void add_penalties(DifferencePasses& passes, double times, std::vector<at::Tensor>& sums) {
    for (std::size_t i = 0; i < passes.terms.size(); ++i) {
      for (std::size_t k = 0; passes.terms[i].left > 0 && k < passes.terms[i].probes.size(); ++k) {
        add_probe(passes, i, k, times, sums);
      }
    }
  }

  /// What one probe adds to that.
  void add_probe(DifferencePasses& passes, std::size_t index, std::size_t k, double times,
                 std::vector<at::Tensor>& sums) {
    const DifferenceProbe& probe = passes.terms[index].probes[k];
    const auto [per_norm, scale] = distance(passes, index, probe, times);
    const double weight = passes.weights.loss;
    if (!passes.due) {
      passes.far = false;
    }
    std::vector<at::Tensor> there = displaced_gradient(passes, index, k, settings_.central ? per_norm * 0.5 : per_norm);
    if (settings_.central) {
      const std::vector<at::Tensor> back = displaced_gradient(passes, index, k, per_norm * -0.5);
      // A step of one's own is for its author to choose.
      passes.far = passes.far || (settings_.step == 0 && !watch_.is_straight(back, probe.gradient, there));
      subtract(there, back);
    }
    if (passes.far && !passes.due) {
      auto exact = exactly(passes, std::pair(index, k));
      if (!exact.has_value()) {
        throw DifferenceError(
            text({passes.batch.term(index).name, ": on micro-batch ", passes.part.index,
                  " the change between the points of a difference is lost in rounding (an almost fitted batch), and an "
                  "operation has no second derivative to differentiate it exactly; choose a larger .step, or replace "
                  "that operation"}));
      }
      add_scaled(sums, std::move(*exact));
      if (probe.brings_loss) {
        add_scaled(sums, probe.gradient, weight);
      }
      return;
    }
    if (probe.brings_loss) {  // one sweep instead of three
      add_scaled(sums, extrapolated(probe.gradient, std::move(there), scale / weight), weight);
      return;
    }
    if (!settings_.central) {
      subtract(there, probe.gradient);
    }
    add_scaled(sums, std::move(there), scale);
  }

  /// Whether the first pass normalised over so few elements that a difference in float32 may be lost in rounding, or
  /// bent, and no pass shows it.
  [[nodiscard]] bool normalises_few(const DifferencePasses& passes) const {
    constexpr std::int64_t few = 8;
    return settings_.gates == Gates::frozen && passes.gates.fewest_normalised() <= few;
  }

  /// Adds the penalties' gradient by double backward then, and the loss gradient if a displaced pass was to bring it.
  /// Without a second derivative two lengths have to agree. On this micro-batch and for it alone: others may be at work
  /// beside it, and what it shows is not remembered.
  void add_of_few(DifferencePasses& passes, std::vector<at::Tensor>& sums) {
    for (DifferenceTerm& term : passes.terms) {
      for (DifferenceProbe& probe : term.probes) {
        if (std::exchange(probe.brings_loss, false)) {
          add_scaled(sums, probe.gradient, passes.weights.loss);
        }
      }
    }
    if (auto exact = exactly(passes, std::nullopt)) {
      return add_scaled(sums, *std::move(exact));
    }
    passes.due = true;
    keep_gates(passes);
    std::vector<at::Tensor> found = all_penalties(passes, 1);
    const Comparison comparison = compare(found, all_penalties(passes, 2));
    if (comparison.finite() && !terms_.agrees(passes, comparison)) {
      terms_.refuse(passes, comparison, comparison, 1, /*exact=*/false);
    }
    add_scaled(sums, std::move(found));
  }

  /// Releases no gates until the micro-batch is done: how many passes there will be is not known.
  static void keep_gates(DifferencePasses& passes) {
    passes.left = std::numeric_limits<std::size_t>::max();
    for (DifferenceTerm& term : passes.terms) {
      term.left = term.left > 0 ? std::numeric_limits<std::size_t>::max() : 0;
    }
  }

  std::vector<at::Tensor> all_penalties(DifferencePasses& passes, double times) {
    std::vector<at::Tensor> result(parameters_.tensors.size());
    add_penalties(passes, times, result);
    return result;
  }

  /// Whether `work()` went through: a missing second derivative is anybody's exception. Memory that ran out is none.
  template <class Work>
  static bool is_differentiable(const Work& work) {
    try {
      work();
      return true;
    } catch (const std::bad_alloc&) {
      throw;
    } catch (const c10::OutOfMemoryError&) {
      throw;
    } catch (const std::exception& error) {
      if (std::string_view(error.what()).find("can't allocate memory") != std::string_view::npos) {
        throw;  // the CPU's allocator has no type of its own
      }
      return false;
    }
  }

  /// The same by double backward of one more pass at the first point, or of one probe only. Nothing where an operation
  /// has no second derivative. Throws DifferenceError if that pass does not repeat the first.
  std::optional<std::vector<at::Tensor>> exactly(DifferencePasses& passes,
                                                 const std::optional<std::pair<std::size_t, std::size_t>>& only) {
    const auto factor = [&](std::size_t i) { return passes.weights.strengths[i] * passes.weights.penalty; };
    const auto counts = [&](std::size_t i) { return factor(i) > 0 && (!only || only->first == i); };
    const FusedScope fused(fused_);
    const std::uint64_t beginning = at::sequence_number::peek();
    std::vector<std::vector<at::Tensor>> probes(passes.terms.size());
    FurtherPass pass(passes);
    const auto evaluation = repeated(passes.gates, [&] { return passes.batch.evaluate(passes.part, {}); });
    if (passes.due) {
      passes.suspects = suspects(evaluation->loss, parameters_, beginning);
    }
    for (std::size_t i = 0; i < passes.terms.size(); ++i) {
      DifferenceTerm& term = passes.terms[i];
      if (counts(i)) {
        term.draws.replay();
        probes[i] =
            repeated(*term.gates, [&] { return checked_probes(*evaluation, i, passes.batch.term(i), &term.draws); });
        ProbeWatch::require_as_many(passes.batch.term(i), term, probes[i]);
      }
    }
    pass.end();
    double largest = 0;
    for (std::size_t i = 0; i < passes.terms.size(); ++i) {
      largest = std::max(largest, factor(i));
    }
    DoubleBackward step(*evaluation, parameters_, HalfRange(1, autocast_, parameters_), largest);
    for (std::size_t i = 0; i < passes.terms.size(); ++i) {
      if (!counts(i)) {
        continue;
      }
      const TermInfo& info = passes.batch.term(i);
      for (std::size_t k = 0; k < probes[i].size(); ++k) {
        if (!only || only->second == k) {
          const DifferenceProbe& before = passes.terms[i].probes[k];
          const at::Tensor moved = distance(passes, i, before, 1).per_norm * before.squared_norm;
          ProbeWatch::require_repeated(info.name, before, probes[i][k], moved.item<double>());
        }
      }
      if (only) {
        probes[i] = {probes[i][only->second]};
      }
      const auto add = [&] { (void)step.add(info, probes[i], factor(i), factor(i) > 0, passes.terms[i].squared_norm); };
      if (!is_differentiable(add)) {
        return std::nullopt;
      }
    }
    std::vector<at::Tensor> result(parameters_.tensors.size());
    if (!is_differentiable([&] { add_scaled(result, step.finish(std::nullopt)); })) {
      return std::nullopt;
    }
    return result;
  }

  /// Adds what a difference gives for all penalties if that agrees with double backward; if the automatic displacement
  /// turns out too short or too long, with the one that does, which holds from then on.
  void add_proven(DifferencePasses& passes, std::vector<at::Tensor>& sums) {
    keep_gates(passes);
    std::optional<std::vector<at::Tensor>> exact;
    struct Trial {
      std::vector<at::Tensor> found;
      Comparison comparison;
    };
    const auto trial = [&](double times) {
      Trial result{all_penalties(passes, times), {}};
      if (times == 1) {
        exact = exactly(passes, std::nullopt);
      }
      result.comparison = compare(result.found, exact ? *exact : all_penalties(passes, 2 * times));
      return result;
    };
    Trial best = trial(1);
    if (proof_.factor != 1 && !terms_.agrees(passes, best.comparison)) {  // it was right once: all lengths anew
      proof_.factor = 1;
      passes.far = false;
      best = trial(1);
    }
    const Comparison first = best.comparison;
    const bool far = passes.far;
    double times = 1;
    const bool finite = first.finite();
    if (finite && !terms_.agrees(passes, first)) {
      for (const double other : {8., 64., 512., 4096., 32768.}) {
        Trial next = trial(other);
        if (next.comparison.error() < best.comparison.error()) {
          best = std::move(next);
          times = other;
        } else if (terms_.agrees(passes, best.comparison)) {
          break;
        }
      }
      // A shorter one may be right by chance here, and is an explanation only.
      const bool agreed =
          terms_.agrees(passes, best.comparison) && settings_.step == 0 && passes.suspects.sentence.empty();
      if (!agreed && exact && far && proof_.given) {
        return add_scaled(sums, *exact);  // lost in rounding here; another micro-batch has to prove it
      }
      if (!agreed) {
        if (Trial shorter = trial(0.125); shorter.comparison.error() < 0.5 * best.comparison.error()) {
          best = std::move(shorter);
          times = 0.125;
        }
        terms_.refuse(passes, first, best.comparison, times, exact.has_value());
      }
      proof_.factor *= times;
    } else if (finite && passes.suspects.functions) {
      // At the usual distance their kinks may lie out of reach, on this micro-batch.
      const Comparison far_away = trial(terms_.is_fine() ? 1024 : 8).comparison;
      if (!terms_.agrees(passes, far_away)) {
        terms_.refuse(passes, far_away, far_away, 1, exact.has_value());
      }
    }
    add_scaled(sums, std::move(best.found));
    if (finite) {
      terms_.remember(passes.weights, best.comparison, displacements_.moved_norm());
    }
  }

  /// The gradient of probe k by all parameters, with what counts moved by `distance` times its gradient.
  std::vector<at::Tensor> displaced_gradient(DifferencePasses& passes, std::size_t index, std::size_t k,
                                             const at::Tensor& distance) {
    const TermInfo& info = passes.batch.term(index);
    DifferenceTerm& term = passes.terms[index];
    const DifferenceProbe& probe = term.probes[k];
    --passes.left;
    --term.left;
    std::optional<Displacement> displacement;
    std::optional<Substitution> substitution;
    std::vector<at::Tensor> leaves = parameters_.tensors;
    std::vector<at::Tensor> inputs;
    if (info.by_input) {
      inputs = Displacements::moved(passes.inputs, probe.direction, distance);
    } else if (settings_.displace == Displace::copies) {
      leaves = displacements_.copies(probe.direction, distance);
      substitution.emplace(parameters_.tensors, leaves);
    }
    FurtherPass pass(passes);
    if (!info.by_input && !substitution.has_value()) {  // when buffers are set, which may share the parameters' memory
      displacement.emplace(displacements_.parameters(), probe.direction, distance);
    }
    const auto evaluation = replayed(passes.gates, settings_.frozen(), passes.left == 0,
                                     [&] { return passes.batch.evaluate(passes.part, inputs); });
    term.draws.replay();
    const auto probes = replayed(*term.gates, settings_.frozen(), term.left == 0,
                                 [&] { return checked_probes(*evaluation, index, info, &term.draws); });
    if (!displacement.has_value()) {
      pass.end();
    }
    ProbeWatch::require_as_many(info, term, probes);
    auto result = gradients({probes[k]}, leaves, {}, /*retain_graph=*/false, /*create_graph=*/false, info.name);
    if (displacement.has_value()) {
      displacement.reset();
      pass.end();
    }
    if (substitution.has_value()) {
      const Calls::Again again(passes.calls);  // it clears Autocast's cache, which another's pass may be using
      substitution.reset();
    }
    for (at::Tensor& gradient : result) {  // They will be written to, and autograd may return one tensor twice.
      gradient = gradient.defined() ? owned(std::move(gradient)) : gradient;
    }
    passes.far = !watch_.is_near(probe, probes[k].detach(), result, info.by_input, distance) || passes.far;
    return result;
  }

  /// a -= b, where undefined is zero.
  static void subtract(std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) { add_scaled(a, b, -1.0); }

  DifferenceSettings settings_;
  const Parameters& parameters_;
  Proof& proof_;
  bool fused_;
  std::optional<at::ScalarType> autocast_;
  FirstPass first_pass_;
  Displacements displacements_;
  ProofTerms terms_;
  ProbeWatch watch_;
  std::atomic<bool> differs_ = false;  // some micro-batch was differentiated so
};

}  // namespace microreg::inline MICROREG_ABI::detail
