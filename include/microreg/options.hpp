/// @file
/// The options of Regularizer and of measure.
#pragma once

#include <ATen/core/Generator.h>
#include <c10/util/StringUtil.h>
#include <microreg/error.hpp>
#include <microreg/micro_batch.hpp>
#include <microreg/parameters.hpp>
#include <microreg/strength.hpp>

#include <cstdint>
#include <optional>

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
  if (options.generator.has_value() && !options.generator->defined()) {
    throw OptionError("generator is undefined; make one with at::make_generator, or leave the option empty");
  }
}

}  // namespace detail
}  // namespace microreg
