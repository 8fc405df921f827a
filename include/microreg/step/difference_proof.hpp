/// @file
/// When a difference has to prove itself, and what a proof says.
#pragma once

#include <microreg/detail/text.hpp>
#include <microreg/difference.hpp>
#include <microreg/error.hpp>
#include <microreg/parameters.hpp>
#include <microreg/step/comparison.hpp>
#include <microreg/step/difference_passes.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/probes.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// The terms of a proof: what it remembers from step to step is Proof. `moved_norm` is that of what is displaced, or 0.
class ProofTerms {
 public:
  ProofTerms(const DifferenceSettings& settings, const Parameters& parameters, Proof& proof)
      : settings_(settings), parameters_(parameters), proof_(proof) {}

  [[nodiscard]] bool is_due(const Weights& weights, double moved_norm) const {
    const bool comparable = settings_.gates == Gates::frozen || settings_.tolerance > 0;
    return settings_.check_every > 0 && !parameters_.tensors.front().is_meta() && comparable && differs(weights) &&
           (!proof_.given || proof_.since >= settings_.check_every || has_seen_too_little(weights) ||
            has_another_scale(moved_norm));
  }

  /// Whether there will be further passes.
  static bool differs(const Weights& weights) {
    return std::any_of(weights.strengths.begin(), weights.strengths.end(),
                       [](double strength) { return strength > 0; });
  }

  void remember(const Weights& weights, const Comparison& comparison, double moved_norm) const {
    proof_.given = true;
    proof_.since = 0;
    const bool seen = comparison.norm > 0 && comparison.distance <= tolerance() * comparison.norm;
    proof_.gap = seen && proof_.factor == 1 ? 0 : std::max<std::int64_t>(1, 2 * proof_.gap);
    proof_.moved_norm = moved_norm;
    proof_.strengths.resize(weights.strengths.size());
    std::transform(weights.strengths.begin(), weights.strengths.end(), proof_.strengths.begin(),
                   proof_.strengths.begin(), [](double now, double then) { return std::max(now, then); });
  }

  [[nodiscard]] bool is_fine() const {
    return std::all_of(parameters_.tensors.begin(), parameters_.tensors.end(),
                       [](const at::Tensor& parameter) { return parameter.scalar_type() == at::kDouble; });
  }

  /// Ten times what a difference is off on deep networks (docs/estimators.md), and less than what goes wrong in
  /// silence.
  [[nodiscard]] double tolerance() const {
    if (settings_.tolerance > 0) {
      return settings_.tolerance;
    }
    if (settings_.step > 0) {
      return 5e-2;
    }
    return is_fine() ? 1e-3 : settings_.central ? 2e-2 : 5e-2;
  }

  /// Within the tolerance, or too small to be seen in the sum of loss gradient and penalties.
  [[nodiscard]] bool agrees(const DifferencePasses& passes, const Comparison& comparison) const {
    const double epsilon = epsilon_of(is_fine() ? at::kDouble : at::kFloat);
    const double whole = passes.weights.loss * passes.loss_gradient_norm + comparison.norm;
    return comparison.finite() &&
           (comparison.distance <= tolerance() * comparison.norm || comparison.distance <= 64 * epsilon * whole ||
            comparison.distance + comparison.norm <= std::sqrt(epsilon) * whole);
  }

  [[noreturn]] void refuse(const DifferencePasses& passes, const Comparison& first, const Comparison& best,
                           double times, bool exact) const {
    std::string why;
    if (settings_.gates == Gates::free) {
      why = "the gates are free, which makes another regularizer on a network with kinks: use Gates::frozen";
    } else if (!passes.suspects.sentence.empty()) {
      why = passes.suspects.sentence;
    } else if (best.error() < 0.5 * first.error() && times > 1) {
      why =
          text({"the displacement is lost in rounding (what is displaced is small, or the network computes in a "
                "coarser type than its parameters): one ",
                times, " times as long is off by ", in_percent(best.error()),
                settings_.step > 0 ? "; choose a larger .step, or 0" : "; choose .step by experiment"});
    } else if (best.error() < 0.5 * first.error()) {
      why = text({"the displacement is too long for this network: one of ", times, " times the length is off by ",
                  in_percent(best.error()), "; choose a smaller .step"});
    } else {
      why =
          "something that double backward takes for a constant moves with the parameters, or the other way round: "
          "values without a graph, memory that is cached between passes, a gradient that is not that of its function";
    }
    const std::string where = where_it_is(first, parameters_);
    throw DifferenceError(
        text({settings_.central ? "CentralDifference" : "ForwardDifference", " is off by ", in_percent(first.error()),
              " of the penalty's gradient, where ", in_percent(tolerance()), " are allowed, ",
              exact ? "against double backward of micro-batch " : "at twice its displacement, on micro-batch ",
              passes.part.index, where.empty() ? "" : ", ", where, ". ", why,
              ". Otherwise use Exact, or a larger .tolerance if this is what you want"}));
  }

 private:
  /// A displacement is proven at one scale of what it moves: biases that were zero, or a layer scale that has grown,
  /// ask for another one. On a device, where reading would wait, and where nothing is looked at, the gap has to do.
  [[nodiscard]] bool has_another_scale(double now) const {
    return settings_.step == 0 && (now > 2 * proof_.moved_norm || 2 * now < proof_.moved_norm);
  }

  /// A proof of a sum says nothing of a part that was too small to be seen in it, as at the beginning of a warm-up.
  [[nodiscard]] bool has_seen_too_little(const Weights& weights) const {
    if (proof_.gap > 0 && proof_.since >= proof_.gap) {
      return true;
    }
    const std::vector<double>& seen = proof_.strengths;
    return (proof_.gap > 0 || seen.size() > 1) &&
           !std::equal(weights.strengths.begin(), weights.strengths.end(), seen.begin(), seen.end(),
                       [](double now, double then) { return now <= 4 * then; });
  }

  DifferenceSettings settings_;
  const Parameters& parameters_;
  Proof& proof_;
};

}  // namespace microreg::inline MICROREG_ABI::detail
