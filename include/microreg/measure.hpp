/// @file
/// measure: loss and penalties of a batch without a gradient step, for monitoring.
#pragma once

#include <microreg/options.hpp>
#include <microreg/report.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/objective.hpp>

#include <utility>

namespace microreg::inline MICROREG_ABI {

/// Loss and penalties of a batch, cut into micro-batches as Regularizer does, averaged with the same weights.
///
/// It does not disturb training: no `.grad` is written, no graph is kept, and buffers (BatchNorm statistics) and random
/// number generators are put back bitwise. The model is evaluated in the mode it is in. Every micro-batch is measured.
/// Cost: one forward pass, and one backward pass per probe. Throws as
/// Regularizer::backward does, except NonFiniteError.
///
/// ```cpp
/// auto report = microreg::measure(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{}, images, labels,
///                                 {.micro_batch_size = 128});
/// double squared_norm = report.penalties[0].value.item<double>();
/// ```
template <class M, class Loss, class PenaltyOrSum, class Input, class Target>
[[nodiscard]] Report measure(M&& model, Loss loss, PenaltyOrSum penalty, const Input& input, const Target& target,
                             MeasureOptions options = {}) {
  return detail::on_one_batch(std::forward<M>(model), std::move(loss), std::move(penalty), input, target,
                              detail::options_of(std::move(options)), &detail::measure_step);
}

}  // namespace microreg::inline MICROREG_ABI

#if !defined(MICROREG_COMPILED)
#include <microreg/definitions/step.hpp>
#endif
