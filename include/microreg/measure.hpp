/// @file
/// measure: loss and penalties of a batch without a gradient step, for monitoring.
#pragma once

#include <microreg/detail/micro_batch_loop.hpp>
#include <microreg/estimators/probes.hpp>

#include <utility>
#include <vector>

namespace microreg {

/// Loss and penalties of a batch, cut into micro-batches as Regularizer does, averaged with the same weights.
///
/// It does not disturb training: no `.grad` is written, no graph is kept, and buffers (BatchNorm statistics) and random
/// number generators are put back bitwise. The model is evaluated in the mode it is in. Every micro-batch is measured,
/// whatever `micro_batch_share` and `every` say. Cost: one forward pass, and one backward pass per probe. Throws as
/// Regularizer::backward does, except NonFiniteError.
///
/// ```cpp
/// auto report = microreg::measure(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{}, images, labels,
///                                 {.micro_batch_size = 128});
/// double squared_norm = report.penalties[0].value.item<double>();
/// ```
template <class M, class Loss, class PenaltyOrSum, class Input, class Target>
[[nodiscard]] Report measure(M&& model, Loss loss, PenaltyOrSum penalty, const Input& input, const Target& target,
                             RegularizerOptions options = {}) {
  detail::assert_batches<Input, Target>();
  detail::validate(options);
  auto handle = detail::make_handle(std::forward<M>(model));
  const auto terms = detail::as_terms(std::move(penalty));
  detail::MicroBatchLoop loop(handle, options, input, target);
  const std::vector<double> strengths = detail::strengths_at(terms, options.strength, 0);
  try {
    Report report = loop.run(loss, terms, strengths, detail::all_penalised(loop.count()),
                             [&](const auto& micro_batch, const auto&, std::vector<at::Tensor>& squared_norms) {
                               const auto evaluated = micro_batch();
                               detail::squared_norms(evaluated.pass(), terms, loop.parameters(), squared_norms);
                             });
    loop.restore();
    return report;
  } catch (...) {
    loop.restore();
    throw;
  }
}

}  // namespace microreg
