/// @file
/// Differentiation of penalties by differences of first derivatives, with or without frozen gates.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <microreg/detail/displacement.hpp>
#include <microreg/detail/gradients.hpp>
#include <microreg/detail/penalised.hpp>
#include <microreg/detail/snapshot.hpp>
#include <microreg/estimators/estimator.hpp>
#include <microreg/estimators/probes.hpp>
#include <microreg/gates/scope.hpp>
#include <microreg/parameters.hpp>
#include <microreg/penalty.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

namespace microreg::detail {

/// ForwardDifference or CentralDifference.
struct DifferenceSettings {
  double step;
  microreg::Gates gates;  // not the list of that name beside it
  bool central;
};
inline DifferenceSettings settings_of(const ForwardDifference& forward) { return {forward.step, forward.gates, false}; }
inline DifferenceSettings settings_of(const CentralDifference& central) { return {central.step, central.gates, true}; }

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

/// Estimates the penalty's gradient by displaced passes, for all micro-batches of one step.
///
/// The first pass over a micro-batch gives the loss gradient and, for each probe s, its gradient g by what the penalty
/// counts (parameters or input) and its gradient by all parameters. Each further pass, at a point displaced along g,
/// gives the gradient of s by all parameters there; the difference over the displacement is the second derivative along
/// g. For GradientNorm all of the first pass is one backward pass. The further passes draw the same random numbers and
/// see the same buffers as the first, and leave no trace: parameters, buffers and generators are afterwards what one
/// pass leaves. Nothing is read from the device.
template <class... P>
class FiniteDifference {
 public:
  FiniteDifference(DifferenceSettings settings, const std::tuple<Weighted<P>...>& terms,
                   std::span<const double> strengths, const Parameters& parameters)
      : settings_(settings), terms_(terms), strengths_(strengths), parameters_(parameters) {}

  /// Adds the gradient of one penalised micro-batch to `sums` and fills `squared_norms`, one a penalty.
  template <class MicroBatch>
  void operator()(const MicroBatch& micro_batch, const MicroBatchWeights& weights, std::vector<at::Tensor>& sums,
                  std::vector<at::Tensor>& squared_norms) {
    const Snapshot before = micro_batch.snapshot();
    GateTape gates;
    std::array<Term, sizeof...(P)> first;
    first_pass(micro_batch, weights, gates, first, sums, squared_norms);
    std::size_t left = 0;  // further passes
    for (std::size_t i = 0; i < first.size(); ++i) {
      first[i].left = strengths_[i] > 0 ? first[i].probes.size() * (settings_.central ? 2 : 1) : 0;
      left += first[i].left;
    }
    if (left == 0) {
      return;
    }
    const Snapshot after = micro_batch.snapshot();
    const auto estimate = [&]<std::size_t I>() {
      if (first[I].left > 0) {
        add_penalty<I>(micro_batch, weights, Context{before, gates, left}, first[I], squared_norms[I], sums);
      }
    };
    [&]<std::size_t... I>(std::index_sequence<I...>) {
      (estimate.template operator()<I>(), ...);
    }(std::index_sequence_for<P...>{});
    after.restore();
  }

 private:
  /// One probe in the first pass.
  struct Probe {
    std::vector<at::Tensor> gradient;   // by all parameters; empty where the penalty has strength 0
    std::vector<at::Tensor> direction;  // g: by what counts; undefined where the probe does not depend on it
    at::Tensor squared_norm;            // of g
    bool brings_loss = false;           // its displaced pass adds the loss gradient too
  };
  /// One penalty in the first pass.
  struct Term {
    std::vector<Probe> probes;
    std::optional<GeneratorStates> generators;  // before the probes were made
    Draws draws;
    GateTape gates;  // of the probes, which not every further pass makes
    std::size_t left = 0;
  };
  struct Context {
    const Snapshot& before;
    GateTape& gates;  // of forward pass and loss
    std::size_t& left;
  };

  template <class Evaluate>
  auto recorded(GateTape& gates, const Evaluate& evaluate) const {
    std::optional<RecordGates> scope;
    if (settings_.gates == microreg::Gates::frozen) {
      scope.emplace(gates);
    }
    return evaluate();
  }

  template <class Evaluate>
  auto replayed(GateTape& gates, std::size_t left, const Evaluate& evaluate) const {
    if (settings_.gates == microreg::Gates::free) {
      return evaluate();
    }
    ReplayGates scope(gates, left > 0 ? Keep::yes : Keep::no);
    auto result = evaluate();
    scope.finish();
    return result;
  }

  template <class MicroBatch>
  void first_pass(const MicroBatch& micro_batch, const MicroBatchWeights& weights, GateTape& gates,
                  std::array<Term, sizeof...(P)>& first, std::vector<at::Tensor>& sums,
                  std::vector<at::Tensor>& squared_norms) const {
    const auto evaluated = recorded(gates, [&] { return micro_batch(); });
    std::vector<std::pair<Probe*, double>> loss_probes;  // with the strengths of their penalties
    const auto differentiate = [&]<class Q>(const Q& penalty, double strength, Term& term) {
      const auto pass = evaluated.pass(&term.draws);
      term.generators.emplace(micro_batch.generators());
      const auto probes = recorded(term.gates, [&] { return probes_of(penalty, pass); });
      term.probes.reserve(probes.size());
      for (const at::Tensor& probe : probes) {
        Probe& result = term.probes.emplace_back();
        if (!differentiates_input<Q> && probe.is_same(pass.loss)) {
          loss_probes.emplace_back(&result, strength);
          continue;
        }
        split(penalty, strength > 0, probe, counted_tensors(penalty, pass, parameters_), result);
      }
    };
    [&]<std::size_t... I>(std::index_sequence<I...>) {
      (differentiate(std::get<I>(terms_).penalty, strengths_[I], first[I]), ...);
    }(std::index_sequence_for<P...>{});

    // Last, so that the graph can go while it is differentiated.
    auto loss_gradient = gradients({evaluated.loss}, parameters_.tensors, {}, /*retain_graph=*/false,
                                   /*create_graph=*/false, "the loss");
    bool brought = false;
    for (const auto& [probe, strength] : loss_probes) {
      for (const std::size_t i : parameters_.selected) {
        probe->direction.push_back(loss_gradient[i]);
      }
      probe->gradient = loss_gradient;
      probe->brings_loss = strength > 0 && !settings_.central && !brought;
      brought = brought || probe->brings_loss;
    }
    if (!brought) {
      accumulate(sums, std::move(loss_gradient), weights.loss);
    }

    const auto measure = [&]<class Q>(const Q& penalty, Term& term, at::Tensor& squared) {
      for (Probe& probe : term.probes) {
        require_dependence(penalty, probe.direction, parameters_);
        probe.squared_norm = squared_norm(probe.direction, evaluated.loss.options());
        squared = squared.defined() ? squared + probe.squared_norm : probe.squared_norm;
      }
    };
    [&]<std::size_t... I>(std::index_sequence<I...>) {
      (measure(std::get<I>(terms_).penalty, first[I], squared_norms[I]), ...);
    }(std::index_sequence_for<P...>{});
  }

  /// Differentiates a probe that is not the loss: by what counts and, if `all`, by all parameters, in one pass.
  template <class Q>
  void split(const Q& penalty, bool all, const at::Tensor& probe, const std::vector<at::Tensor>& counted,
             Probe& result) const {
    const auto differentiate = [&](const std::vector<at::Tensor>& inputs) {
      return gradients({probe}, inputs, {}, /*retain_graph=*/true, /*create_graph=*/false, penalty.name());
    };
    if (!all) {
      result.direction = differentiate(counted);
    } else if constexpr (differentiates_input<Q>) {
      std::vector<at::Tensor> inputs = parameters_.tensors;
      inputs.insert(inputs.end(), counted.begin(), counted.end());
      result.gradient = differentiate(inputs);
      const auto boundary = result.gradient.begin() + static_cast<std::ptrdiff_t>(parameters_.tensors.size());
      result.direction.assign(boundary, result.gradient.end());
      result.gradient.erase(boundary, result.gradient.end());
    } else {
      result.gradient = differentiate(parameters_.tensors);
      for (const std::size_t i : parameters_.selected) {
        result.direction.push_back(result.gradient[i]);
      }
    }
  }

  /// Adds weights.penalty * strength * grad R_M, one displaced pass (or two) a probe.
  template <std::size_t I, class MicroBatch>
  void add_penalty(const MicroBatch& micro_batch, const MicroBatchWeights& weights, Context context, Term& term,
                   const at::Tensor& squared, std::vector<at::Tensor>& sums) {
    using Q = std::tuple_element_t<I, std::tuple<P...>>;
    const double factor = strengths_[I] * weights.penalty;
    for (std::size_t k = 0; k < term.probes.size(); ++k) {
      const Probe& probe = term.probes[k];
      const at::Tensor length = displacement_length<Q>(micro_batch, probe);
      const at::Tensor per_norm = over_norm(probe.squared_norm, 1.0) * length;  // e
      // dR/dg over e: 2 ||g|| / length, or, for an unsquared norm, that over 2 R.
      const at::Tensor slope = probe.squared_norm.sqrt() / length;
      const at::Tensor scale = is_squared<Q> ? slope * (2 * factor) : slope * over_norm(squared, factor);
      const auto displaced = [&](double times) {
        return displaced_gradient<I>(micro_batch, context, term, k, per_norm * times);
      };
      if (probe.brings_loss) {  // one sweep instead of three
        accumulate(sums, extrapolated(probe.gradient, displaced(1), scale / weights.loss), weights.loss);
        continue;
      }
      std::vector<at::Tensor> difference = displaced(settings_.central ? 0.5 : 1);
      subtract(difference, settings_.central ? displaced(-0.5) : probe.gradient);
      accumulate(sums, std::move(difference), scale);
    }
  }

  /// The norm of the displacement, a scalar on the device.
  template <class Q, class MicroBatch>
  at::Tensor displacement_length(const MicroBatch& micro_batch, const Probe& probe) {
    if (settings_.step > 0) {
      return at::full_like(probe.squared_norm, settings_.step);
    }
    const at::TensorOptions scalar = probe.squared_norm.options();
    if constexpr (differentiates_input<Q>) {
      return automatic_length(differentiable_tensors(micro_batch.input()), scalar);
    } else {
      if (!parameter_length_.defined()) {
        const std::vector<at::Tensor> moved = selected_parameters();
        check_precision(moved);
        parameter_length_ = automatic_length(moved, scalar).clamp_max(largest_step(settings_.central));
      }
      return parameter_length_.to(scalar);
    }
  }

  at::Tensor automatic_length(const std::vector<at::Tensor>& moved, const at::TensorOptions& scalar) const {
    const at::Tensor squared = squared_norm(moved, scalar);
    // What is all zero has no scale: displace by the step itself then.
    return at::where(squared == 0, at::ones_like(squared), squared.sqrt()) * relative_step(moved, settings_.central);
  }

  [[nodiscard]] std::vector<at::Tensor> selected_parameters() const {
    std::vector<at::Tensor> result;
    result.reserve(parameters_.selected.size());
    for (const std::size_t i : parameters_.selected) {
      result.push_back(parameters_.tensors[i]);
    }
    return result;
  }

  /// The gradient of probe k by all parameters, with what counts moved by `distance` times its gradient.
  template <std::size_t I, class MicroBatch>
  std::vector<at::Tensor> displaced_gradient(const MicroBatch& micro_batch, Context context, Term& term, std::size_t k,
                                             const at::Tensor& distance) {
    using Q = std::tuple_element_t<I, std::tuple<P...>>;
    const Q& penalty = std::get<I>(terms_).penalty;
    const Probe& probe = term.probes[k];
    --context.left;
    --term.left;
    context.before.restore();
    const auto differentiate = [&](const auto& evaluate) {
      const auto evaluated = replayed(context.gates, context.left, evaluate);
      term.generators->restore();
      term.draws.replay();
      const auto pass = evaluated.pass(&term.draws);
      const auto probes = replayed(term.gates, term.left, [&] { return probes_of(penalty, pass); });
      if (probes.size() != term.probes.size()) {
        throw ModelError(c10::str(penalty.name(), ": there were ", term.probes.size(), " probes in the first pass and ",
                                  probes.size(), " in a further one; return as many in every pass"));
      }
      auto result = gradients({probes[k]}, parameters_.tensors, {}, /*retain_graph=*/false, /*create_graph=*/false,
                              penalty.name());
      for (at::Tensor& gradient : result) {  // They will be written to, and autograd may return one tensor twice.
        gradient = gradient.defined() ? owned(std::move(gradient)) : gradient;
      }
      return result;
    };
    if constexpr (differentiates_input<Q>) {
      return differentiate([&] { return micro_batch(displaced(micro_batch.input(), probe.direction, distance)); });
    } else {
      if (!displaceable_.has_value()) {
        displaceable_.emplace(selected_parameters());
      }
      const Displacement displacement(*displaceable_, probe.direction, distance);
      return differentiate([&] { return micro_batch(); });
    }
  }

  /// A displacement a ten-thousandth of the parameters vanishes in half types.
  static void check_precision(const std::vector<at::Tensor>& parameters) {
    for (const at::Tensor& parameter : parameters) {
      if (parameter.scalar_type() != at::kFloat && parameter.scalar_type() != at::kDouble) {
        throw OptionError(
            c10::str("estimator.step is 0 (automatic) for parameters in ", c10::toString(parameter.scalar_type()),
                     ", too coarse a type for small displacements; keep the parameters in float32, choose "
                     "a step by experiment, or use Exact"));
      }
    }
  }

  /// `input` with the tensors that require a gradient moved by distance * directions[i].
  template <class Input>
  static Input displaced(Input input, const std::vector<at::Tensor>& directions, const at::Tensor& distance) {
    std::size_t next = 0;
    for_each_tensor(input, "input", [&](at::Tensor& tensor, const std::string&) {
      if (tensor.requires_grad()) {
        const at::Tensor& direction = directions[next++];
        const at::Tensor plain = tensor.detach();
        tensor = direction.defined() ? at::addcmul(plain, direction, distance.to(plain.device(), plain.scalar_type()))
                                     : plain;
        tensor.requires_grad_(true);
      }
    });
    return input;
  }

  /// a -= b, where undefined is zero.
  static void subtract(std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) { accumulate(a, b, -1.0); }

  DifferenceSettings settings_;
  const std::tuple<Weighted<P>...>& terms_;
  std::span<const double> strengths_;
  const Parameters& parameters_;
  std::optional<Displaceable> displaceable_;  // the selected parameters; made when first needed, as is
  at::Tensor parameter_length_;               // their automatic displacement
};

/// The estimator as a FiniteDifference; empty for Exact.
template <class... P>
std::optional<FiniteDifference<P...>> finite_difference(const Estimator& estimator,
                                                        const std::tuple<Weighted<P>...>& terms,
                                                        std::span<const double> strengths,
                                                        const Parameters& parameters) {
  if (const auto* forward = std::get_if<ForwardDifference>(&estimator)) {
    return FiniteDifference<P...>(settings_of(*forward), terms, strengths, parameters);
  }
  if (const auto* central = std::get_if<CentralDifference>(&estimator)) {
    return FiniteDifference<P...>(settings_of(*central), terms, strengths, parameters);
  }
  return std::nullopt;
}

}  // namespace microreg::detail
