/// @file
/// Exact differentiation of penalties by double backward.
#pragma once

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/interception.hpp>
#include <microreg/detail/plain_tensors.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/parameters.hpp>
#include <microreg/step/gradients.hpp>
#include <microreg/step/gram.hpp>
#include <microreg/step/graph.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/probes.hpp>
#include <microreg/step/scaling.hpp>
#include <microreg/step/seeded_roots.hpp>
#include <microreg/step/tensor_lists.hpp>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// What float16 asks for: where backward passes start, and whether numbers may be too small for it at all.
struct HalfRange {
  Scale scale;
  bool narrow = false;

  HalfRange(Scale start, const std::optional<at::ScalarType>& autocast, const Parameters& parameters)
      : scale(std::move(start)), narrow(!scale.is_one() || autocast == at::kHalf) {
    const c10::DeviceType device = parameters.tensors.front().device().type();
    narrow = narrow ||
             (at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device) &&
              at::autocast::get_autocast_dtype(device) == at::kHalf) ||
             std::any_of(parameters.tensors.begin(), parameters.tensors.end(),
                         [](const at::Tensor& tensor) { return tensor.scalar_type() == at::kHalf; });
  }
};

/// The exact gradient of one micro-batch, penalty by penalty, then in one pass through everything.
///
/// The scalar R_M never exists as a graph: the backward pass of the probe's gradients g is seeded with the derivative
/// of R_M by g, which is 2 g, or g / ||g|| for an unsquared norm. The loss joins that pass as one more root, also where
/// it is itself a probe: its gradient need not be kept then. Cost: one backward pass with a graph per probe, and one
/// pass through everything. A penalty with strength 0 is measured but not differentiated; where nothing is, the loss
/// gradient that it measured is taken as it is.
///
/// In half types numbers below 6e-8 vanish (float16) and seeds are small ones: weight, strength and g multiplied. There
/// the first pass starts at the loss scale S, which gives S g; the penalties are differentiated in a pass of their own,
/// which starts at g itself, and its result, S times too large again, is multiplied in float32 by what is missing. So
/// nothing depends on how small the strength is. The loss takes one more backward pass then, unless its gradient was
/// measured.
class DoubleBackward {
 public:
  /// `largest`: of the factors that add() will be called with.
  DoubleBackward(const Evaluation& evaluation, const Parameters& parameters, const HalfRange& range, double largest)
      : evaluation_(evaluation),
        parameters_(parameters),
        scale_(range.scale),
        largest_(largest),
        apart_(range.narrow && largest > 0) {}

  /// Differentiates a penalty by its probes with `factor` = strength * weight, and returns its squared gradient norm.
  /// `wanted`: the factor is not 0; otherwise the penalty is measured. `whole`: that norm, where the probes are a part
  /// of the penalty's.
  ///
  /// The first pass gives the gradient g itself, which is what hooks and functions of the user's own see, at any
  /// strength. A squared norm needs no copy of g for the seeds: g is scaled in place where nobody else holds it.
  at::Tensor add(const TermInfo& term, const std::vector<at::Tensor>& probes, const Factor& factor, bool wanted,
                 const at::Tensor& whole = {}) {
    at::Tensor squared;
    std::vector<at::Tensor> differentiable;
    std::vector<GramFactors> products;
    const bool fused = is_intercepting();
    for (const at::Tensor& probe : probes) {
      auto g = probe_gradient(term, probe, wanted);
      add_to(squared, scale_.divided_out(squared_norm(g, probe.options())));
      if (apart_ && !term.by_input && probe.is_same(evaluation_.loss) && g.size() == parameters_.tensors.size()) {
        loss_gradient_ = detached(g);
      }
      for (at::Tensor& gradient : g) {
        if (!wanted || !gradient.requires_grad()) {
          continue;
        }
        if (std::optional<GramFactors> factors = fused ? gram_factors(gradient) : std::nullopt) {
          products.push_back(*std::move(factors));
          gradient = at::Tensor();
        } else {
          differentiable.push_back(std::move(gradient));
        }
      }
    }
    if (!differentiable.empty() || !products.empty()) {
      const at::NoGradGuard no_grad;
      const Factor share = apart_ ? Factor(factor.number() / (2 * largest_)) : factor;
      const Factor seed = term.squared ? seed_factor(share.times(2))
                                       : seed_factor(share).times(over_norm(whole.defined() ? whole : squared, 1));
      starts_.add(differentiable,
                  [&] { return term.squared ? taken_and_scaled(differentiable, seed) : scaled(differentiable, seed); });
      for (const GramFactors& product : products) {
        starts_.add(product.roots(), [&] {
          std::vector<at::Tensor> seeds = product.seeds();
          return taken_and_scaled(seeds, seed);
        });
      }
    }
    return squared;
  }

  /// The gradients of the probes, with their graph.
  [[nodiscard]] const std::vector<at::Tensor>& roots() const noexcept { return starts_.roots(); }

  /// The gradient of weight * loss and of all penalties; of these alone without a weight. The graph is gone afterwards.
  [[nodiscard]] std::vector<WeightedGradients> finish(const std::optional<Factor>& weight) {
    const bool penalised = !roots().empty();
    std::vector<WeightedGradients> result;
    if (!weight.has_value()) {
      // nothing of the loss
    } else if (!loss_gradient_.empty() && (apart_ || !penalised)) {
      result.push_back({std::move(loss_gradient_), scale_.over(*weight)});
    } else if (apart_ || !scale_.is_one()) {
      result.push_back({gradients({evaluation_.loss}, parameters_.tensors, scale_.seeds(evaluation_.loss),
                                  penalised || evaluation_.shares_graph, /*create_graph=*/false, "the loss"),
                        scale_.over(*weight)});
    } else if (penalised) {
      starts_.add({evaluation_.loss}, [&] { return std::vector<at::Tensor>{weight->like(evaluation_.loss)}; });
    } else {
      result.push_back({gradients({evaluation_.loss}, parameters_.tensors, {weight->like(evaluation_.loss)},
                                  evaluation_.shares_graph, /*create_graph=*/false, "the loss"),
                        Factor(1)});
    }
    loss_gradient_.clear();
    if (penalised) {
      const at::Tensor all = starts_.taken();
      result.push_back({gradients({all}, parameters_.tensors, {all.detach()}, evaluation_.shares_graph,
                                  /*create_graph=*/false, "the exact penalty", /*second=*/true),
                        apart_ ? scale_.over(2 * largest_) : Factor(1)});
    }
    return result;
  }

 private:
  /// The gradient of the probe by what counts, undefined ones left out. Where no graph is wanted, the loss is
  /// differentiated by all parameters and kept, since that may be all that is needed.
  std::vector<at::Tensor> probe_gradient(const TermInfo& term, const at::Tensor& probe, bool wanted) {
    const auto differentiate = [&](const std::vector<at::Tensor>& inputs) {
      return gradients({probe}, inputs, scale_.seeds(probe), /*retain_graph=*/true, /*create_graph=*/wanted, term.name);
    };
    std::vector<at::Tensor> counted;
    if (!term.by_input && !wanted && probe.is_same(evaluation_.loss)) {
      loss_gradient_ = differentiate(parameters_.tensors);
      counted = selected(loss_gradient_, parameters_);
    } else {
      counted = differentiate(counted_tensors(evaluation_, term, parameters_));
    }
    require_dependence(term, counted, parameters_);
    return defined(counted);
  }

  /// From S g to the seed: apart, it is g itself for the strongest penalty, and 2 * largest / S is left to the end.
  [[nodiscard]] Factor seed_factor(const Factor& share) const { return apart_ ? scale_.over(share) : share; }

  const Evaluation& evaluation_;
  const Parameters& parameters_;
  Scale scale_;
  double largest_;
  bool apart_;  ///< whether loss and penalties are differentiated one after the other
  SeededRoots starts_;
  std::vector<at::Tensor> loss_gradient_;
};

inline double strongest_of(const std::vector<double>& strengths) {
  return strengths.empty() ? 0.0 : *std::max_element(strengths.begin(), strengths.end());
}

/// grad(weights.loss * L_M + weights.penalty * sum of strength * R_M), from the probes of each penalty.
inline Estimated double_backward(const MiniBatch& batch, const Evaluation& evaluation,
                                 std::vector<std::vector<at::Tensor>> probes, const Weights& weights,
                                 const Parameters& parameters, const HalfRange& range) {
  Estimated result;
  DoubleBackward step(evaluation, parameters, range, strongest_of(weights.strengths) * weights.penalty);
  try {
    for (std::size_t i = 0; i < batch.terms(); ++i) {
      result.squared_norms.push_back(step.add(batch.term(i), std::exchange(probes[i], {}), weights.on_penalty(i),
                                              /*wanted=*/weights.strengths[i] * weights.penalty > 0));
    }
    result.gradients = step.finish(weights.loss != 0 ? std::optional(weights.on_loss()) : std::nullopt);
  } catch (const MissingDerivative& error) {
    const std::string place = place_of(error.operation(), evaluation.loss, parameters.tensors, parameters.names);
    throw ModelError(place.empty() ? std::string(error.what()) : text({error.what(), " (it stands ", place, ")"}));
  }
  return result;
}

}  // namespace microreg::inline MICROREG_ABI::detail
