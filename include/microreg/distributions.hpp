/// @file
/// Predictive distributions: how a model's output is read as a distribution over labels, for FisherTrace.
///
/// Dimension 1 of the output is the event (the classes, or the components of one prediction); every other position is
/// a sample of its own. So [M, C] holds M samples and a dense output [M, C, H, W] holds M*H*W of them, and the negative
/// log-likelihood is the sum over the event and the mean over samples, as LibTorch's cross_entropy has it.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <microreg/detail/finite.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>

#include <concepts>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI {

/// What FisherTrace needs of a distribution: labels drawn without a graph, and their mean negative log-likelihood with
/// one.
template <class D>
concept PredictiveDistribution =
    requires(const D& distribution, const at::Tensor& output, const std::optional<at::Generator>& generator) {
      { distribution.sample(output, generator) } -> std::convertible_to<at::Tensor>;
      { distribution.negative_log_likelihood(output, output) } -> std::convertible_to<at::Tensor>;
    };

namespace detail {
/// Adds up dimension 1, the event, where there is one.
inline at::Tensor event_sum(const at::Tensor& per_component) {
  return per_component.dim() > 1 ? per_component.sum(1) : per_component;
}
}  // namespace detail

/// Class labels from logits [M, C, ...], C at least 2, by softmax over dimension 1, or over `.class_dimension`: -1 for
/// [M, T, C].
struct Categorical {
  std::int64_t class_dimension = 1;  ///< where the classes lie; negative: counted from the end

  /// Labels [M, ...] in int64. Drawn by the Gumbel-max rule: at::multinomial would synchronise a CUDA device to check
  /// its input.
  [[nodiscard]] at::Tensor sample(const at::Tensor& output, const std::optional<at::Generator>& generator) const {
    const at::Tensor logits = checked(output);
    const at::NoGradGuard no_grad;
    const at::ScalarType type = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const at::Tensor scores = logits.detach().to(type);
    return (scores - at::empty_like(scores).exponential_(1.0, generator).log_()).argmax(1);
  }
  /// The mean over samples of -log p(label), a scalar, for labels as sample() gives them.
  [[nodiscard]] at::Tensor negative_log_likelihood(const at::Tensor& logits, const at::Tensor& labels) const {
    return at::cross_entropy_loss(checked(logits), labels);
  }
  /// One scalar for each of N samples and C classes, sqrt(p) / N * -log p with the factor sqrt(p) / N held constant:
  /// `hold(make)` returns what `make()` does, the same in every pass over a micro-batch. The sum of their squared
  /// gradient norms is the expectation over labels of the squared norm of the gradient of the mean negative
  /// log-likelihood: the scores of independent labels have mean zero, so only the terms of one sample stay.
  template <class Hold>
  [[nodiscard]] std::vector<at::Tensor> expected_probes(const at::Tensor& output, const Hold& hold) const {
    const at::Tensor logits = checked(output);
    const at::Tensor log_p = at::log_softmax(logits, 1);
    const double samples = static_cast<double>(logits.numel()) / static_cast<double>(logits.size(1));
    const at::Tensor factor = hold([&] {
      const at::NoGradGuard no_grad;
      return (log_p / 2).exp() / samples;
    });
    return (log_p * factor).neg().flatten().unbind();
  }

  /// Throws ModelError where integer targets have the shape of the output without its last dimension, and not that
  /// without the classes': the classes lie last then.
  void check_target(const at::Tensor& output, const at::Tensor& target) const {
    if (output.dim() < 3 || !target.defined() || target.dim() + 1 != output.dim() ||
        !at::isIntegralType(target.scalar_type(), /*includeBool=*/false)) {
      return;
    }
    const std::int64_t classes = class_dimension < 0 ? class_dimension + output.dim() : class_dimension;
    const auto without = [&](std::int64_t dimension) {
      std::vector<std::int64_t> sizes = output.sizes().vec();
      sizes.erase(sizes.begin() + dimension);
      return sizes;
    };
    const std::int64_t last = output.dim() - 1;
    if (classes > 0 && classes < last && target.sizes() != without(classes) && target.sizes() == without(last)) {
      throw ModelError(detail::text({"Categorical reads dimension ", class_dimension, " of the output ", output.sizes(),
                                     " as the classes, but the target has shape ", target.sizes(),
                                     ", so that they seem to lie last: say FisherTrace{Categorical{.class_dimension = "
                                     "-1}}"}));
    }
  }

 private:
  /// The logits as [M, C, ...].
  [[nodiscard]] at::Tensor checked(const at::Tensor& logits) const {
    if (logits.dim() < 2 || class_dimension == 0 || class_dimension >= logits.dim() ||
        class_dimension <= -logits.dim() || logits.size(class_dimension) == 1) {
      throw ModelError(
          detail::text({"Categorical needs logits of shape [M, C, ...], got ", logits.sizes(),
                        " with classes along dimension ", class_dimension, "; for one logit a sample use Bernoulli"}));
    }
    return class_dimension == 1 ? logits : logits.movedim(class_dimension, 1);
  }
};

/// Binary labels from logits of any shape, each component independent.
struct Bernoulli {
  /// Labels of the shape and type of the logits: 1 with probability sigmoid(logit), otherwise 0.
  [[nodiscard]] at::Tensor sample(const at::Tensor& logits, const std::optional<at::Generator>& generator) const {
    const at::NoGradGuard no_grad;
    return at::bernoulli(logits.detach().sigmoid(), generator);
  }
  /// Binary cross-entropy, summed over dimension 1 (of [M], nothing) and averaged over the rest: a scalar.
  [[nodiscard]] at::Tensor negative_log_likelihood(const at::Tensor& logits, const at::Tensor& labels) const {
    return detail::event_sum(at::binary_cross_entropy_with_logits(logits, labels, /*weight=*/{}, /*pos_weight=*/{},
                                                                  at::Reduction::None))
        .mean();
  }
};

/// Real labels from predicted means of any shape, each component independent with the same standard deviation.
struct Gaussian {
  double standard_deviation = 1.0;  ///< in the units of the output; must be positive and finite

  /// mean + standard_deviation * e with e standard normal. Throws OptionError for a deviation out of range.
  [[nodiscard]] at::Tensor sample(const at::Tensor& mean, const std::optional<at::Generator>& generator) const {
    if (!(detail::is_finite(standard_deviation) && standard_deviation > 0)) {
      throw OptionError(
          detail::text({"standard_deviation is ", standard_deviation, "; it must be positive and finite"}));
    }
    const at::NoGradGuard no_grad;
    return mean.detach() + at::empty_like(mean).normal_(0, standard_deviation, generator);
  }
  /// Up to the constant log(standard_deviation * sqrt(2 pi)), which has no gradient.
  [[nodiscard]] at::Tensor negative_log_likelihood(const at::Tensor& mean, const at::Tensor& labels) const {
    return detail::event_sum((mean - labels).square()).mean() / (2 * standard_deviation * standard_deviation);
  }
};

/// A distribution of your own from two callables: `sample(output, generator)` and `negative_log_likelihood(output,
/// labels)`.
///
/// ```cpp
/// microreg::FisherTrace penalty{microreg::Distribution{
///     [](const torch::Tensor& log_rate, auto generator) { return torch::poisson(log_rate.exp(), generator); },
///     [](const torch::Tensor& log_rate, const torch::Tensor& y) { return (log_rate.exp() - y * log_rate).mean(); }}};
/// ```
template <class Sample, class NegativeLogLikelihood>
struct Distribution {
  Sample sample_function;                                  ///< returns labels; called without a graph
  NegativeLogLikelihood negative_log_likelihood_function;  ///< returns the mean over samples, a scalar with a graph

  /// What sample_function(output, generator) returns, with the output detached and under a NoGradGuard.
  [[nodiscard]] at::Tensor sample(const at::Tensor& output, const std::optional<at::Generator>& generator) const {
    static_assert(std::is_invocable_r_v<at::Tensor, const Sample&, at::Tensor, const std::optional<at::Generator>&>,
                  "microreg: the first callable of a Distribution must take (output, generator) and return labels as a "
                  "torch::Tensor");
    const at::NoGradGuard no_grad;
    return sample_function(output.detach(), generator);
  }
  /// What negative_log_likelihood_function(output, labels) returns, as it is.
  [[nodiscard]] at::Tensor negative_log_likelihood(const at::Tensor& output, const at::Tensor& labels) const {
    static_assert(
        std::is_invocable_r_v<at::Tensor, const NegativeLogLikelihood&, const at::Tensor&, const at::Tensor&>,
        "microreg: the second callable of a Distribution must take (output, labels) and return the mean negative "
        "log-likelihood as a torch::Tensor");
    return negative_log_likelihood_function(output, labels);
  }
};
template <class Sample, class NegativeLogLikelihood>
Distribution(Sample, NegativeLogLikelihood) -> Distribution<Sample, NegativeLogLikelihood>;  ///< of two callables

}  // namespace microreg::inline MICROREG_ABI
