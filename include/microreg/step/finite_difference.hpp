/// @file
/// Differentiation of penalties by differences of first derivatives, with or without frozen gates.
#pragma once

#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/grad_mode.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/finite.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/estimator.hpp>
#include <microreg/fused/scope.hpp>
#include <microreg/gates/scope.hpp>
#include <microreg/gates/unseen.hpp>
#include <microreg/parameters.hpp>
#include <microreg/step/comparison.hpp>
#include <microreg/step/differences.hpp>
#include <microreg/step/displacement.hpp>
#include <microreg/step/double_backward.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/own_code.hpp>
#include <microreg/step/probes.hpp>
#include <microreg/step/snapshot.hpp>
#include <microreg/step/suspects.hpp>
#include <microreg/step/tensor_lists.hpp>
#include <microreg/step/untouched.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// ForwardDifference or CentralDifference.
struct DifferenceSettings {
  double step;
  microreg::Gates gates;  // not the list of that name beside it
  bool central;
  std::int64_t check_every;
  double tolerance;
  OwnFunctions own_functions;
};

/// The automatic step, as a multiple of the norm of what is displaced: where the error of the difference (which grows
/// with the step, or its square) and rounding (which grows with its inverse) meet on random ReLU networks
/// (benchmarks/step_study.cpp).
inline double relative_step(const std::vector<at::Tensor>& displaced, bool central) {
  const bool fine = std::all_of(displaced.begin(), displaced.end(),
                                [](const at::Tensor& tensor) { return tensor.scalar_type() == at::kDouble; });
  if (fine) {
    return central ? 1e-6 : 1e-8;
  }
  return central ? 5e-4 : 5e-5;
}

/// The largest automatic step in float32: on wide networks, whose parameters have a large norm, the error of the
/// difference goes with the displacement itself (measured on ResNet-18 and VGG-11).
inline double largest_step(bool central) { return central ? 2e-3 : 4e-4; }

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
        looks_(request.looks) {}

  std::vector<at::Tensor> operator()(MiniBatch& batch, const Part& part, const Weights& weights,
                                     const Snapshot& snapshot, std::vector<at::Tensor>& sums,
                                     const std::function<void(Evaluation&)>& keep) override {
    const Untouched untouched(batch, parameters_);
    Passes passes{batch, part, weights,        snapshot.buffers_now(), {}, std::vector<Term>(batch.terms()),
                  {},    0,    is_due(weights)};
    first_pass(passes, sums, keep);
    for (std::size_t i = 0; i < passes.terms.size(); ++i) {
      const std::size_t probes = passes.terms[i].probes.size();
      passes.terms[i].left = weights.strengths[i] > 0 ? probes * (settings_.central ? 2 : 1) : 0;
      passes.left += passes.terms[i].left;
    }
    if (passes.left > 0) {
      untouched.require(passes.gates);
      const Snapshot after = snapshot.buffers_now();
      if (passes.due) {
        add_proven(passes, sums);
      } else {
        for (std::size_t i = 0; i < passes.terms.size(); ++i) {
          if (passes.terms[i].left > 0) {
            add_penalty(passes, i, sums);
          }
        }
      }
      after.restore_buffers();
      differs_ = true;
    }
    std::vector<at::Tensor> squared_norms;
    for (const Term& term : passes.terms) {
      squared_norms.push_back(term.squared_norm);
    }
    return squared_norms;
  }

  void finish() override {
    if (excess_.defined() && excess_.item<double>() > 1) {
      throw_not_shared("one of its displaced passes", text({"off by ", excess_.item<double>(), " times the bound"}));
    }
    proof_.since += differs_ ? 1 : 0;
  }

 private:
  /// One probe in the first pass.
  struct Probe {
    at::Tensor value;                   // s itself
    std::vector<at::Tensor> gradient;   // by all parameters; empty where the penalty has strength 0
    std::vector<at::Tensor> direction;  // g: by what counts; undefined where the probe does not depend on it
    at::Tensor squared_norm;            // of g
    bool is_loss = false;
    bool brings_loss = false;  // its displaced pass adds the loss gradient too
  };
  /// One penalty in the first pass.
  struct Term {
    std::vector<Probe> probes;
    at::Tensor squared_norm;
    Draws draws;
    std::unique_ptr<GateTape> gates =
        std::make_unique<GateTape>();  // of the probes, which not every further pass makes
    std::size_t left = 0;              // further passes
  };
  /// One micro-batch.
  struct Passes {
    MiniBatch& batch;
    const Part& part;
    const Weights& weights;
    Snapshot before;
    GateTape gates;  // of forward pass and loss
    std::vector<Term> terms;
    std::vector<at::Tensor> inputs;
    std::size_t left;               // further passes
    bool due;                       // a proof is
    bool far = false;               // a displaced probe was not where it should be
    double loss_gradient_norm = 0;  // where a proof is due
    Suspects suspects = {};         // likewise
  };

  [[nodiscard]] Frozen frozen() const {
    return settings_.gates == microreg::Gates::frozen ? Frozen::all : Frozen::draws;
  }

  template <class Evaluate>
  auto recorded(GateTape& gates, const Evaluate& evaluate) const {
    const GateScope scope(gates, GateSession::Pass::record, microreg::Keep::yes, frozen());
    return evaluate();
  }

  template <class Evaluate>
  auto replayed(GateTape& gates, bool last, const Evaluate& evaluate) const {
    const GateScope scope(gates, GateSession::Pass::replay, last ? microreg::Keep::no : microreg::Keep::yes, frozen());
    auto result = evaluate();
    scope.session().finish();
    return result;
  }

  /// At the first point, where decisions are made again by themselves.
  template <class Evaluate>
  static auto repeated(GateTape& gates, const Evaluate& evaluate) {
    const GateScope scope(gates, GateSession::Pass::replay, microreg::Keep::yes, Frozen::draws);
    return evaluate();
  }

  [[nodiscard]] bool is_due(const Weights& weights) {
    const bool comparable = settings_.gates == microreg::Gates::frozen || settings_.tolerance > 0;
    return settings_.check_every > 0 && !parameters_.tensors.front().is_meta() && comparable && differs(weights) &&
           (!proof_.given || proof_.since >= settings_.check_every || has_seen_too_little(weights) ||
            has_another_scale());
  }

  /// A displacement is proven at one scale of what it moves: biases that were zero, or a layer scale that has grown,
  /// ask for another one. On a device, where reading would wait, and where nothing is looked at, the gap has to do.
  [[nodiscard]] bool has_another_scale() {
    const double now = moved_norm();
    return settings_.step == 0 && (now > 2 * proof_.moved_norm || 2 * now < proof_.moved_norm);
  }

  /// Of the parameters that are displaced.
  const at::Tensor& squared_parameter_norm() {
    if (!squared_parameter_norm_.defined()) {
      const std::vector<at::Tensor> moved = selected(parameters_.tensors, parameters_);
      squared_parameter_norm_ = squared_norm(moved, moved.front().options());
    }
    return squared_parameter_norm_;
  }

  double moved_norm() {
    const bool looks = looks_ != CheckFinite::never && squared_parameter_norm().is_cpu();
    return looks ? std::sqrt(squared_parameter_norm().item<double>()) : 0.0;
  }

  /// Whether there will be further passes.
  static bool differs(const Weights& weights) {
    return std::any_of(weights.strengths.begin(), weights.strengths.end(),
                       [](double strength) { return strength > 0; });
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

  void remember(const Weights& weights, const Comparison& comparison) {
    proof_.given = true;
    proof_.since = 0;
    const bool seen = comparison.norm > 0 && comparison.distance <= tolerance() * comparison.norm;
    proof_.gap = seen && proof_.factor == 1 ? 0 : std::max<std::int64_t>(1, 2 * proof_.gap);
    proof_.moved_norm = moved_norm();
    proof_.strengths.resize(weights.strengths.size());
    std::transform(weights.strengths.begin(), weights.strengths.end(), proof_.strengths.begin(),
                   proof_.strengths.begin(), [](double now, double then) { return std::max(now, then); });
  }

  void first_pass(Passes& passes, std::vector<at::Tensor>& sums, const std::function<void(Evaluation&)>& keep) const {
    const auto evaluation = recorded(passes.gates, [&] { return passes.batch.evaluate(passes.part, {}); });
    require_seen(evaluation->loss, "the loss", {&passes.gates}, differs(passes.weights));
    passes.inputs = evaluation->inputs;
    for (std::size_t i = 0; i < passes.terms.size(); ++i) {
      const TermInfo& info = passes.batch.term(i);
      Term& term = passes.terms[i];
      for (const at::Tensor& probe :
           recorded(*term.gates, [&] { return checked_probes(*evaluation, i, info, &term.draws); })) {
        Probe& result = term.probes.emplace_back();
        result.value = probe.detach();
        result.is_loss = !info.by_input && probe.is_same(evaluation->loss);
        if (!result.is_loss) {
          require_seen(probe, info.name, {&passes.gates, term.gates.get()}, passes.weights.strengths[i] > 0);
          split(info, passes.weights.strengths[i] > 0, probe, counted_tensors(*evaluation, info, parameters_), result);
        }
      }
    }
    keep(*evaluation);

    // Last, so that the graph can go while it is differentiated.
    auto loss_gradient = gradients({evaluation->loss}, parameters_.tensors, {}, /*retain_graph=*/false,
                                   /*create_graph=*/false, "the loss");
    if (passes.due) {
      passes.loss_gradient_norm =
          squared_norm(loss_gradient, evaluation->loss.options()).sqrt().template item<double>();
    }
    bool brought = false;
    for (std::size_t i = 0; i < passes.terms.size(); ++i) {
      Term& term = passes.terms[i];
      for (Probe& probe : term.probes) {
        if (probe.is_loss) {
          probe.direction = selected(loss_gradient, parameters_);
          probe.gradient = loss_gradient;
          probe.brings_loss = passes.weights.strengths[i] > 0 && !settings_.central && !brought && !passes.due;
          brought = brought || probe.brings_loss;
        }
        require_dependence(passes.batch.term(i), probe.direction, parameters_);
        probe.squared_norm = squared_norm(probe.direction, evaluation->loss.options());
        add_to(term.squared_norm, probe.squared_norm);
      }
    }
    if (!brought) {
      add_scaled(sums, std::move(loss_gradient), passes.weights.loss);
    }
  }

  /// Throws where a scalar has kinks that the scopes did not see, and a further pass would make anew.
  void require_seen(const at::Tensor& scalar, const std::string& what, const std::vector<const GateTape*>& tapes,
                    bool displaced) const {
    if (settings_.gates == microreg::Gates::free) {
      return;
    }
    const std::vector<std::string> unseen = unseen_kinks(scalar, tapes);
    if (!unseen.empty()) {
      throw GateError(
          text({what, " has an operation with a kink that cannot be frozen, ", unseen.front(),
                unseen.size() > 1 ? text({" and ", unseen.size() - 1, " more"}) : std::string(),
                ": it ran in another thread, a scripted model or a recomputation; use Exact, or Gates::free "
                "where the difference may be another regularizer"}));
    }
    if (!displaced || settings_.own_functions == OwnFunctions::smooth) {
      return;
    }
    if (const auto [function, hook] = own_code({scalar}, parameters_); !function.empty() || !hook.empty()) {
      throw GateError(
          text({what, function.empty() ? " has a hook at " : " has a function of one's own, ",
                function.empty() ? hook : function,
                ", of which nobody but its author knows whether it has a kink, which a difference would have to "
                "freeze, or changes gradients; set .own_functions = OwnFunctions::smooth in the estimator if it does "
                "neither, else use Exact"}));
    }
  }

  /// Differentiates a probe that is not the loss: by what counts and, if `all`, by all parameters, in one pass.
  void split(const TermInfo& term, bool all, const at::Tensor& probe, const std::vector<at::Tensor>& counted,
             Probe& result) const {
    const auto differentiate = [&](const std::vector<at::Tensor>& inputs) {
      return gradients({probe}, inputs, {}, /*retain_graph=*/true, /*create_graph=*/false, term.name);
    };
    if (!all) {
      result.direction = differentiate(counted);
    } else if (term.by_input) {
      std::vector<at::Tensor> inputs = parameters_.tensors;
      inputs.insert(inputs.end(), counted.begin(), counted.end());
      result.gradient = differentiate(inputs);
      const auto boundary = result.gradient.begin() + static_cast<std::ptrdiff_t>(parameters_.tensors.size());
      result.direction.assign(boundary, result.gradient.end());
      result.gradient.erase(boundary, result.gradient.end());
    } else {
      result.gradient = differentiate(parameters_.tensors);
      result.direction = selected(result.gradient, parameters_);
    }
  }

  /// How far a probe is displaced, and what the difference of its gradients counts.
  struct Distance {
    at::Tensor per_norm;  // e: what is displaced moves by e g
    at::Tensor scale;     // weights.penalty * strength * dR/dg over e
  };

  Distance distance(const Passes& passes, std::size_t index, const Probe& probe, double times) {
    const TermInfo& info = passes.batch.term(index);
    const double factor = passes.weights.strengths[index] * passes.weights.penalty;
    const at::Tensor length = displacement_length(info, passes.inputs, probe) * times;
    // dR/dg over e: 2 ||g|| / length, or, for an unsquared norm, that over 2 R.
    const at::Tensor slope = probe.squared_norm.sqrt() / length;
    return {over_norm(probe.squared_norm, 1.0) * length,
            info.squared ? slope * (2 * factor) : slope * over_norm(passes.terms[index].squared_norm, factor)};
  }

  /// Adds weights.penalty * strength * grad R_M, one displaced pass (or two) a probe.
  void add_penalty(Passes& passes, std::size_t index, std::vector<at::Tensor>& sums) {
    const Term& term = passes.terms[index];
    for (std::size_t k = 0; k < term.probes.size(); ++k) {
      const Probe& probe = term.probes[k];
      const auto [per_norm, scale] = distance(passes, index, probe, 1);
      passes.far = false;
      const auto displaced = [&, e = per_norm](double times) {
        return displaced_gradient(passes, index, k, e * times);
      };
      std::vector<at::Tensor> there = displaced(settings_.central ? 0.5 : 1);
      std::vector<at::Tensor> back = settings_.central ? displaced(-0.5) : std::vector<at::Tensor>();
      if (passes.far) {
        if (auto exact = double_backward_again(passes, std::pair(index, k))) {
          add_scaled(sums, std::move(*exact));
          if (probe.brings_loss) {
            add_scaled(sums, probe.gradient, passes.weights.loss);
          }
          continue;
        }
      }
      if (probe.brings_loss) {  // one sweep instead of three
        const double weight = passes.weights.loss;
        add_scaled(sums, extrapolated(probe.gradient, std::move(there), scale / weight), weight);
        continue;
      }
      subtract(there, settings_.central ? back : probe.gradient);
      add_scaled(sums, std::move(there), scale);
    }
  }

  /// The same for all penalties, with displacements `times` as long.
  std::vector<at::Tensor> all_penalties(Passes& passes, double times) {
    std::vector<at::Tensor> result(parameters_.tensors.size());
    for (std::size_t i = 0; i < passes.terms.size(); ++i) {
      for (std::size_t k = 0; passes.terms[i].left > 0 && k < passes.terms[i].probes.size(); ++k) {
        const Probe& probe = passes.terms[i].probes[k];
        const auto [per_norm, scale] = distance(passes, i, probe, times);
        std::vector<at::Tensor> difference =
            displaced_gradient(passes, i, k, settings_.central ? per_norm * 0.5 : per_norm);
        subtract(difference, settings_.central ? displaced_gradient(passes, i, k, per_norm * -0.5) : probe.gradient);
        add_scaled(result, std::move(difference), scale);
      }
    }
    return result;
  }

  /// The same by double backward of one more pass at the first point, or of one probe only. Nothing where an operation
  /// has no second derivative. Throws DifferenceError if that pass does not repeat the first.
  std::optional<std::vector<at::Tensor>> double_backward_again(
      Passes& passes, const std::optional<std::pair<std::size_t, std::size_t>>& only) {
    passes.before.restore_buffers();
    const FusedScope fused(fused_);
    const std::uint64_t beginning = at::sequence_number::peek();
    const auto evaluation = repeated(passes.gates, [&] { return passes.batch.evaluate(passes.part, {}); });
    if (passes.due) {
      passes.suspects = suspects(evaluation->loss, parameters_, beginning);
    }
    std::vector<at::Tensor> roots;
    std::vector<at::Tensor> seeds;
    for (std::size_t i = 0; i < passes.terms.size(); ++i) {
      Term& term = passes.terms[i];
      const TermInfo& info = passes.batch.term(i);
      const double factor = passes.weights.strengths[i] * passes.weights.penalty;
      if (factor <= 0 || (only && only->first != i)) {
        continue;
      }
      term.draws.replay();
      const auto probes = repeated(*term.gates, [&] { return checked_probes(*evaluation, i, info, &term.draws); });
      require_as_many(info, term, probes);
      for (std::size_t k = 0; k < probes.size(); ++k) {
        if (only && only->second != k) {
          continue;
        }
        require_repeated(passes, i, term.probes[k], probes[k]);
        try {
          for (const at::Tensor& g :
               gradients({probes[k]}, counted_tensors(*evaluation, info, parameters_), {}, /*retain_graph=*/true,
                         /*create_graph=*/true, info.name)) {
            if (g.defined() && g.requires_grad()) {
              const at::NoGradGuard no_grad;
              roots.push_back(g);
              seeds.push_back(info.squared ? g.detach() * (2 * factor)
                                           : g.detach() * over_norm(term.squared_norm, factor).to(g.scalar_type()));
            }
          }
        } catch (const std::exception&) {
          return std::nullopt;
        }
      }
    }
    if (roots.empty()) {
      return std::vector<at::Tensor>(parameters_.tensors.size());
    }
    try {
      return gradients({seeded_roots(roots, std::move(seeds))}, parameters_.tensors, {}, /*retain_graph=*/false,
                       /*create_graph=*/false, "the exact penalty");
    } catch (const std::exception&) {
      return std::nullopt;
    }
  }

  /// Adds what a difference gives for all penalties if that agrees with double backward; if the automatic displacement
  /// turns out too short or too long, with the one that does, which holds from then on.
  void add_proven(Passes& passes, std::vector<at::Tensor>& sums) {
    passes.left = std::numeric_limits<std::size_t>::max();  // no gates are released
    for (Term& term : passes.terms) {
      term.left = term.left > 0 ? std::numeric_limits<std::size_t>::max() : 0;
    }
    std::optional<std::vector<at::Tensor>> exact;
    struct Trial {
      std::vector<at::Tensor> found;
      Comparison comparison;
    };
    const auto trial = [&](double times) {
      Trial result{all_penalties(passes, times), {}};
      if (times == 1) {
        exact = double_backward_again(passes, std::nullopt);
      }
      result.comparison = compare(result.found, exact ? *exact : all_penalties(passes, 2 * times));
      return result;
    };
    Trial best = trial(1);
    if (proof_.factor != 1 && !agrees(passes, best.comparison)) {  // it was right once: all lengths anew
      proof_.factor = 1;
      passes.far = false;
      best = trial(1);
    }
    const Comparison first = best.comparison;
    const bool far = passes.far;
    double times = 1;
    const bool finite = first.finite();
    if (finite && !agrees(passes, first)) {
      for (const double other : {8., 64., 512., 4096., 32768.}) {
        Trial next = trial(other);
        if (next.comparison.error() < best.comparison.error()) {
          best = std::move(next);
          times = other;
        } else if (agrees(passes, best.comparison)) {
          break;
        }
      }
      // A shorter one may be right by chance here, and is an explanation only.
      const bool agreed = agrees(passes, best.comparison) && settings_.step == 0 && passes.suspects.sentence.empty();
      if (!agreed && exact && far && proof_.given) {
        return add_scaled(sums, *exact);  // lost in rounding here; another micro-batch has to prove it
      }
      if (!agreed) {
        if (Trial shorter = trial(0.125); shorter.comparison.error() < 0.5 * best.comparison.error()) {
          best = std::move(shorter);
          times = 0.125;
        }
        refuse(passes, first, best.comparison, times, exact.has_value());
      }
      proof_.factor *= times;
    } else if (finite && passes.suspects.functions) {
      // At the usual distance their kinks may lie out of reach, on this micro-batch.
      const Comparison far_away = trial(is_fine() ? 1024 : 8).comparison;
      if (!agrees(passes, far_away)) {
        refuse(passes, far_away, far_away, 1, exact.has_value());
      }
    }
    add_scaled(sums, std::move(best.found));
    if (finite) {
      remember(passes.weights, best.comparison);
    }
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
  [[nodiscard]] bool agrees(const Passes& passes, const Comparison& comparison) const {
    const double epsilon = epsilon_of(is_fine() ? at::kDouble : at::kFloat);
    const double whole = passes.weights.loss * passes.loss_gradient_norm + comparison.norm;
    return comparison.finite() &&
           (comparison.distance <= tolerance() * comparison.norm || comparison.distance <= 64 * epsilon * whole ||
            comparison.distance + comparison.norm <= std::sqrt(epsilon) * whole);
  }

  [[noreturn]] void refuse(const Passes& passes, const Comparison& first, const Comparison& best, double times,
                           bool exact) const {
    std::string why;
    if (settings_.gates == microreg::Gates::free) {
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

  [[noreturn]] static void throw_not_shared(const std::string& what, const std::string& by) {
    throw DifferenceError(text(
        {what, ": a further pass of a difference does not repeat the first (", by,
         "): noise that is not drawn on this thread by LibTorch, state outside of the model's buffers that a pass "
         "changes, a buffer that is replaced instead of written to, or a tensor that is changed in place. Make it a "
         "buffer, draw with LibTorch's functions, or use Exact"}));
  }

  static void require_as_many(const TermInfo& info, const Term& term, const std::vector<at::Tensor>& probes) {
    if (probes.size() != term.probes.size()) {
      throw ModelError(text({info.name, ": there were ", term.probes.size(), " probes in the first pass and ",
                             probes.size(), " in a further one; return as many in every pass"}));
    }
  }

  /// Throws where a probe at the first point is not what it was.
  void require_repeated(const Passes& passes, std::size_t index, const Probe& first, const at::Tensor& again) {
    const double was = first.value.item<double>();
    const double is = again.item<double>();
    const double rounding = 4096 * epsilon_of(again.scalar_type()) * std::max(std::abs(was), std::abs(is));
    const double moved = (distance(passes, index, first, 1).per_norm * first.squared_norm).item<double>();
    if (std::abs(is - was) > rounding + std::abs(moved)) {
      throw_not_shared(passes.batch.term(index).name, text({"at the same parameters ", is, " instead of ", was}));
    }
  }

  /// Whether a probe that was displaced by `distance` times its gradient has changed by the mean of what its gradients
  /// at both ends say, to half of that change and rounding: the rest goes with the third power of the displacement.
  bool is_near(const Probe& probe, const at::Tensor& value, const std::vector<at::Tensor>& gradient, bool by_input,
               const at::Tensor& distance) {
    if (looks_ == CheckFinite::never) {
      return true;
    }
    const at::NoGradGuard no_grad;
    const auto slope_there = [&] {
      at::Tensor sum = at::zeros_like(probe.squared_norm);
      for (std::size_t i = 0; i < probe.direction.size(); ++i) {
        const at::Tensor& there = gradient[parameters_.selected[i]];
        if (probe.direction[i].defined() && there.defined()) {
          sum = sum + (probe.direction[i] * there).sum(sum.scalar_type()).to(sum.device());
        }
      }
      return sum;
    };
    const double epsilon = epsilon_of(value.scalar_type());
    if (!value.is_cpu()) {
      if (looks_ == CheckFinite::always && !by_input && value.device() == probe.squared_norm.device()) {
        const at::Tensor ends[] = {distance * probe.squared_norm, distance * slope_there()};
        const at::Tensor off = (value - probe.value - (ends[0] + ends[1]) / 2).abs();
        const at::Tensor largest = at::maximum(value.abs(), probe.value.abs()).clamp_min(1);
        const at::Tensor excess = off / ((ends[0].abs() + ends[1].abs()) / 2 + largest * (1024 * epsilon));
        excess_ = excess_.defined() ? at::maximum(excess_, excess) : excess;
      }
      return true;
    }
    const double before = probe.value.item<double>();
    const double change = value.item<double>() - before;
    const double rounding = 64 * epsilon * std::max(std::abs(before), std::abs(before + change));
    const double first_order = (distance * probe.squared_norm).item<double>();
    // What is not finite is not near or far, and has an error of its own.
    const double off = std::abs(change - first_order);
    if (!is_finite(off) || off <= std::abs(first_order) / 2 + rounding) {
      return true;
    }
    const double other_end = by_input ? first_order : (distance * slope_there()).item<double>();
    const double off_mean = std::abs(change - (first_order + other_end) / 2);
    return !is_finite(off_mean) || off_mean <= (std::abs(first_order) + std::abs(other_end)) / 2 + rounding;
  }

  /// The norm of the displacement, a scalar on the device.
  at::Tensor displacement_length(const TermInfo& term, const std::vector<at::Tensor>& inputs, const Probe& probe) {
    if (settings_.step > 0) {
      return at::full_like(probe.squared_norm, settings_.step);
    }
    const at::TensorOptions scalar = probe.squared_norm.options();
    if (term.by_input) {
      check_precision("input", inputs);
      return automatic_length(inputs, squared_norm(inputs, scalar)) * proof_.factor;
    }
    if (!parameter_length_.defined()) {
      const std::vector<at::Tensor> moved = selected(parameters_.tensors, parameters_);
      check_precision("parameters", moved);
      parameter_length_ = automatic_length(moved, squared_parameter_norm()).clamp_max(largest_step(settings_.central));
    }
    return parameter_length_.to(scalar) * proof_.factor;
  }

  at::Tensor automatic_length(const std::vector<at::Tensor>& moved, const at::Tensor& squared) const {
    // What is all zero has no scale: displace by the step itself then.
    return at::where(squared == 0, at::ones_like(squared), squared.sqrt()) * relative_step(moved, settings_.central);
  }

  /// The gradient of probe k by all parameters, with what counts moved by `distance` times its gradient.
  std::vector<at::Tensor> displaced_gradient(Passes& passes, std::size_t index, std::size_t k,
                                             const at::Tensor& distance) {
    const TermInfo& info = passes.batch.term(index);
    Term& term = passes.terms[index];
    const Probe& probe = term.probes[k];
    --passes.left;
    --term.left;
    passes.before.restore_buffers();
    std::optional<Displacement> displacement;
    std::vector<at::Tensor> inputs;
    if (info.by_input) {
      inputs = moved_inputs(passes.inputs, probe.direction, distance);
    } else {
      if (!displaceable_.has_value()) {
        require_separate_memory();
        displaceable_.emplace(selected(parameters_.tensors, parameters_));
      }
      displacement.emplace(*displaceable_, probe.direction, distance);
    }
    const auto evaluation =
        replayed(passes.gates, passes.left == 0, [&] { return passes.batch.evaluate(passes.part, inputs); });
    term.draws.replay();
    const auto probes =
        replayed(*term.gates, term.left == 0, [&] { return checked_probes(*evaluation, index, info, &term.draws); });
    require_as_many(info, term, probes);
    auto result =
        gradients({probes[k]}, parameters_.tensors, {}, /*retain_graph=*/false, /*create_graph=*/false, info.name);
    for (at::Tensor& gradient : result) {  // They will be written to, and autograd may return one tensor twice.
      gradient = gradient.defined() ? owned(std::move(gradient)) : gradient;
    }
    passes.far = !is_near(probe, probes[k].detach(), result, info.by_input, distance) || passes.far;
    return result;
  }

  /// Two parameters on the same memory cannot be moved each by its own gradient, nor two elements of one.
  void require_separate_memory() const {
    for (const std::size_t i : parameters_.selected) {
      if (at::has_internal_overlap(parameters_.tensors[i]) == at::MemOverlap::Yes) {
        throw ModelError(text({"parameter ", parameters_.names[i], " of shape ", parameters_.tensors[i].sizes(),
                               " is expanded, several elements in one place, which a difference cannot move each by "
                               "its own gradient; clone() it before requires_grad_(), or use Exact"}));
      }
      for (std::size_t j = 0; j < parameters_.tensors.size(); ++j) {
        const auto overlap =
            i == j ? at::MemOverlapStatus::No : at::get_overlap_status(parameters_.tensors[i], parameters_.tensors[j]);
        if (overlap == at::MemOverlapStatus::Full || overlap == at::MemOverlapStatus::Partial) {
          throw ModelError(text({"parameters ", parameters_.names[i], " and ", parameters_.names[j],
                                 " share memory, and a difference cannot move one alone; register one tensor in both "
                                 "places, or use Exact"}));
        }
      }
    }
  }

  /// A displacement a ten-thousandth of the parameters vanishes in half types.
  static void check_precision(const char* what, const std::vector<at::Tensor>& tensors) {
    for (const at::Tensor& parameter : tensors) {
      if (parameter.scalar_type() != at::kFloat && parameter.scalar_type() != at::kDouble) {
        throw OptionError(text({"estimator.step is 0 (automatic) for ", what, " in ", parameter.scalar_type(),
                                ", too coarse a type for small displacements; keep the ", what,
                                " in float32, choose a step by experiment, or use Exact"}));
      }
    }
  }

  /// Leaves at inputs[i] + distance * directions[i].
  static std::vector<at::Tensor> moved_inputs(const std::vector<at::Tensor>& inputs,
                                              const std::vector<at::Tensor>& directions, const at::Tensor& distance) {
    std::vector<at::Tensor> result;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      const at::Tensor plain = inputs[i].detach();
      const at::Tensor factor = distance.to(plain.device(), plain.scalar_type());
      result.push_back(directions[i].defined() ? at::addcmul(plain, directions[i], factor) : plain);
      result.back().requires_grad_(true);
    }
    return result;
  }

  /// a -= b, where undefined is zero.
  static void subtract(std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) { add_scaled(a, b, -1.0); }

  DifferenceSettings settings_;
  const Parameters& parameters_;
  Proof& proof_;
  bool fused_;
  CheckFinite looks_;
  bool differs_ = false;                      // some micro-batch was differentiated so
  at::Tensor excess_;                         // on a device: how far a probe was off, over the bound
  std::optional<Displaceable> displaceable_;  // the selected parameters; made when first needed, as is
  at::Tensor squared_parameter_norm_;         // likewise
  at::Tensor parameter_length_;               // their automatic displacement
};

MICROREG_INLINE std::unique_ptr<Differences> make_differences(const DifferenceRequest& request) {
  const auto make = [&](const auto& chosen, bool central) {
    return std::make_unique<FiniteDifference>(DifferenceSettings{chosen.step, chosen.gates, central, chosen.check_every,
                                                                 chosen.tolerance, chosen.own_functions},
                                              request);
  };
  if (const auto* forward = std::get_if<ForwardDifference>(&request.estimator)) {
    return make(*forward, false);
  }
  return make(std::get<CentralDifference>(request.estimator), true);
}

}  // namespace microreg::inline MICROREG_ABI::detail
