/// @file
/// Definitions of options.hpp.
#pragma once

#include <microreg/detail/config.hpp>
#include <microreg/detail/finite.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/options.hpp>

#include <type_traits>
#include <utility>
#include <variant>

namespace microreg::inline MICROREG_ABI::detail {

/// Throws OptionError with the field, its value and the remedy.
MICROREG_INLINE void validate(const RegularizerOptions& options) {
  if (options.micro_batch_size < 1) {
    throw OptionError(
        text({"micro_batch_size is ", options.micro_batch_size, "; it must be at least 1 (the paper uses 128)"}));
  }
  if (!(is_finite(options.sampling.share) && options.sampling.share > 0 && options.sampling.share <= 1)) {
    throw OptionError(text({"sampling.share is ", options.sampling.share,
                            "; it must be greater than 0 and at most 1 (for no penalty, set the strength to 0)"}));
  }
  if (options.sampling.every < 1) {
    throw OptionError(
        text({"sampling.every is ", options.sampling.every, "; it must be at least 1, which penalises every step"}));
  }
  std::visit(
      [](const auto& estimator) {
        if constexpr (!std::is_same_v<std::decay_t<decltype(estimator)>, Exact>) {
          if (!(is_finite(estimator.step) && estimator.step >= 0)) {
            throw OptionError(text({"estimator.step is ", estimator.step,
                                    "; it must be a finite positive number, or 0 for an automatic choice"}));
          }
          if (estimator.check_every < 0) {
            throw OptionError(text({"estimator.check_every is ", estimator.check_every,
                                    "; it must be a number of penalised steps, or 0 for no comparison with Exact"}));
          }
          if (!(is_finite(estimator.tolerance) && estimator.tolerance >= 0)) {
            throw OptionError(text({"estimator.tolerance is ", estimator.tolerance,
                                    "; it must be a finite positive number, or 0 for an automatic choice"}));
          }
        }
      },
      options.estimator);
  if (options.autocast.has_value() && *options.autocast != at::kBFloat16 && *options.autocast != at::kHalf) {
    throw OptionError(text({"autocast is ", *options.autocast,
                            "; it must be BFloat16 or Half, or empty for the types of parameters and input"}));
  }
  if (!(is_finite(options.loss_scale.number) && options.loss_scale.number > 0)) {
    throw OptionError(text({"loss_scale is ", options.loss_scale.number,
                            "; it must be a positive finite number: 1, or for float16 a power of two such as 1024"}));
  }
  if (options.loss_scale.dynamic.has_value()) {
    const DynamicLossScale& scale = *options.loss_scale.dynamic;
    if (!(is_finite(scale.growth) && scale.growth >= 1 && is_finite(scale.backoff) && scale.backoff > 0 &&
          scale.backoff < 1 && scale.interval >= 1)) {
      throw OptionError(text({"loss_scale has growth ", scale.growth, ", backoff ", scale.backoff, " and interval ",
                              scale.interval, "; growth must be at least 1, backoff in (0, 1), interval at least 1"}));
    }
  }
  if ((options.loss_scale.number != 1 || options.loss_scale.dynamic.has_value()) &&
      !std::holds_alternative<Exact>(options.estimator)) {
    throw OptionError(text({"loss_scale is ", options.loss_scale.number,
                            " with a difference, which half types are too coarse for; use Exact"}));
  }
  if (options.reduction == Reduction::total && options.weighting == Weighting::reference) {
    throw OptionError(
        "reduction is Reduction::total, the sum over samples, and weighting is Weighting::reference, which counts "
        "micro-batches alike; use Reduction::sum, or leave weighting at Weighting::samples");
  }
  if (options.cuda_graph != nullptr && !std::holds_alternative<Exact>(options.estimator)) {
    throw OptionError(
        "cuda_graph is set and the estimator is a difference, which moves parameters on the host's word; use Exact, or "
        "leave cuda_graph empty");
  }
  if (options.workers < 0) {
    throw OptionError(text({"workers is ", options.workers,
                            "; it must be a number of threads, such as the processor has cores, or 0 for micro-batches "
                            "one after the other"}));
  }
  for (std::size_t i = 0; i < options.also_train.size(); ++i) {
    if (!options.also_train[i].defined() || !options.also_train[i].requires_grad()) {
      throw OptionError(text({"also_train[", i, "] ",
                              options.also_train[i].defined() ? "does not require a gradient" : "is undefined",
                              "; pass leaves with requires_grad, as module->parameters() gives"}));
    }
  }
  if (options.generator.has_value() && !options.generator->defined()) {
    throw OptionError("generator is undefined; make one with at::make_generator, or leave the option empty");
  }
}

MICROREG_INLINE RegularizerOptions options_of(MeasureOptions options) {
  RegularizerOptions result{.strength = std::move(options.strength),
                            .micro_batch_size = options.micro_batch_size,
                            .weighting = options.weighting,
                            .reduction = options.reduction,
                            .select = std::move(options.select),
                            .generator = std::move(options.generator),
                            .also_train = std::move(options.also_train),
                            .other_leaves = options.other_leaves,
                            .short_last = options.short_last,
                            .autocast = options.autocast,
                            .loss_scale = options.loss_scale,
                            .keep_outputs = options.keep_outputs,
                            .workers = options.workers,
                            .communicator = std::move(options.communicator)};
  validate(result);
  return result;
}

}  // namespace microreg::inline MICROREG_ABI::detail
