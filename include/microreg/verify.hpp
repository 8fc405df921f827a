/// @file
/// verify: tries a model, its loss and its penalties on one micro-batch before a training begins. Not part of
/// microreg/microreg.hpp.
#pragma once

#include <microreg/estimator.hpp>
#include <microreg/options.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/objective.hpp>
#include <microreg/verification.hpp>

#include <utility>

namespace microreg::inline MICROREG_ABI {

namespace detail {
/// The whole of verify().
Verification verify_step(MiniBatch& batch, const RegularizerOptions& options);
}  // namespace detail

/// Tries the first micro-batch with the options of a Regularizer and says what to expect: which operations have no
/// second derivative, which decisions a difference cannot freeze, how far exact, fused and frozen difference are apart,
/// whether the penalties move the gradient, which parameters take part, what a step costs, what is fused, and what to
/// know about batch normalisation, dropout, types and short micro-batches. See docs/verify.md for each line.
///
/// It leaves no trace: parameters, buffers, `.grad`, the batch and random number generators are bitwise what they were,
/// also when model or loss throws. Generators are rewound between its passes, so nothing else should draw meanwhile.
/// Schedules are asked for step 0. The model is evaluated in the mode it is in.
///
/// Cost: some twenty to thirty plain steps of one micro-batch and a copy of parameters and buffers. Waits for a device.
/// Throws BatchError, OptionError and ModelError for what no step can begin with (a batch that cannot be cut, wrong
/// devices, no parameters, a loss without a graph), and whatever model and loss throw in the passes. What only a
/// penalty or an estimator cannot do is in the report instead.
///
/// ```cpp
/// auto found = microreg::verify(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{}, images, labels,
///                               {.strength = 0.01, .micro_batch_size = 64});
/// std::cout << found << '\n';
/// ```
template <class M, class Loss, class PenaltyOrSum, class Input, class Target>
[[nodiscard]] Verification verify(M&& model, Loss loss, PenaltyOrSum penalty, const Input& input, const Target& target,
                                  RegularizerOptions options = {}) {
  detail::validate(options);
  options.communicator = nullptr;  // of this process alone
  return detail::on_one_batch(std::forward<M>(model), std::move(loss), std::move(penalty), input, target, options,
                              &detail::verify_step);
}

}  // namespace microreg::inline MICROREG_ABI

#if !defined(MICROREG_COMPILED)
#include <microreg/definitions/verify.hpp>
#endif
