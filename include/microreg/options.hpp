/// @file
/// The options of Regularizer and of measure.
#pragma once

#include <ATen/core/Generator.h>
#include <c10/util/StringUtil.h>
#include <microreg/error.hpp>
#include <microreg/estimators/estimator.hpp>
#include <microreg/micro_batch.hpp>
#include <microreg/parameters.hpp>
#include <microreg/strength.hpp>

#include <cmath>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <variant>

namespace microreg {

/// How the user's loss reduces over the samples of a micro-batch.
enum class Reduction {
  mean,  ///< the mean over samples, LibTorch's default
  sum,   ///< the sum over samples; microreg divides it by |M|
};

/// When a step looks for NaN and infinity before it touches `.grad`.
enum class CheckFinite {
  on_cpu,  ///< where the values are on the CPU anyway, so that a CUDA device is not synchronised
  always,  ///< every step; synchronises a CUDA device once a step
  never,   ///< call Report::throw_if_not_finite() yourself
};

/// The options of Regularizer. Every member has a default; set those you need by name.
struct RegularizerOptions {
  /// Factor on the penalty, or on each of several: a number or a schedule over steps. Finite, at least 0. At 0 the
  /// penalty is measured but not differentiated.
  Strength strength = 1.0;
  /// |M|, samples in a micro-batch, at least 1. A mini-batch of fewer samples is one micro-batch.
  std::int64_t micro_batch_size = 128;
  /// How the penalty is differentiated: Exact, ForwardDifference or CentralDifference.
  Estimator estimator = Exact{};
  /// q, the share of the micro-batches that is penalised, in (0, 1]. A random subset each step, with a weight that
  /// keeps the gradient unbiased: a step costs 1 + 2q plain steps instead of 3.
  double micro_batch_share = 1.0;
  /// Penalise every k-th step only, with k times the weight, at least 1.
  std::int64_t every = 1;
  /// Seed of the choice that micro_batch_share makes. The choice is a function of seed and step alone.
  std::uint64_t seed = 0;
  /// How much each micro-batch counts.
  Weighting weighting = Weighting::samples;
  /// What the loss callable does over the samples it is given.
  Reduction reduction = Reduction::mean;
  /// Which parameters count in the penalty; all of them if empty. All trainable ones receive the gradient.
  ParameterSelection select = {};
  /// Where labels and directions are drawn from; the default generator of the output's device if empty.
  std::optional<at::Generator> generator = std::nullopt;
  /// When to look for NaN and infinity.
  CheckFinite check_finite = CheckFinite::on_cpu;
  /// Use the fast double backward of microreg/fused, where it applies. The environment variable MICROREG_FUSED=0 turns
  /// it off too.
  bool fused = true;
};

namespace detail {

/// Throws OptionError with the field, its value and the remedy.
inline void validate(const RegularizerOptions& options) {
  if (options.micro_batch_size < 1) {
    throw OptionError(
        c10::str("micro_batch_size is ", options.micro_batch_size, "; it must be at least 1 (the paper uses 128)"));
  }
  if (!(options.micro_batch_share > 0 && options.micro_batch_share <= 1)) {
    throw OptionError(c10::str("micro_batch_share is ", options.micro_batch_share,
                               "; it must be greater than 0 and at most 1 (for no penalty, set the strength to 0)"));
  }
  if (options.every < 1) {
    throw OptionError(c10::str("every is ", options.every, "; it must be at least 1, which penalises every step"));
  }
  std::visit(
      [](const auto& estimator) {
        if constexpr (!std::is_same_v<std::decay_t<decltype(estimator)>, Exact>) {
          if (!(std::isfinite(estimator.step) && estimator.step >= 0)) {
            throw OptionError(c10::str("estimator.step is ", estimator.step,
                                       "; it must be a finite positive number, or 0 for an automatic choice"));
          }
        }
      },
      options.estimator);
  if (options.generator.has_value() && !options.generator->defined()) {
    throw OptionError("generator is undefined; make one with at::make_generator, or leave the option empty");
  }
}

}  // namespace detail
}  // namespace microreg
