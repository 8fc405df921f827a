/// @file
/// What a step found out. Everything is a tensor on the model's device: reading a number from it (`.item()`, printing)
/// is what synchronises a CUDA device, the step itself does not.
#pragma once

#include <ATen/core/Tensor.h>
#include <microreg/version.hpp>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace microreg::inline MICROREG_ABI {

/// One penalty over the micro-batches of a mini-batch.
struct PenaltyReport {
  std::string name;     ///< a second one of the same name is called name#2
  double strength = 0;  ///< the factor in this step's objective
  at::Tensor value;     ///< sum over M of weight(M) * R_M, without the strength; scalar. Where only a share of the
                        ///< micro-batches or steps is penalised, its unbiased estimate from those
  at::Tensor micro_batch_norms;  ///< || grad s_M ||, the unsquared norm, one per penalised micro-batch; K zeros in a
                                 ///< step that has none
};

/// The outcome of `Regularizer::backward` (and, without gradients, of `measure`).
struct Report {
  std::int64_t step = 0;               ///< counted from 0
  std::int64_t first_micro_batch = 0;  ///< index of the first one here: Penalised's part, otherwise 0
  std::int64_t samples = 0;            ///< |B|; of several ranks, those of this one
  /// what the micro-batches here count of all in the step: 1, but for Penalised's part and one of several ranks, whose
  /// loss and penalties are the means over its own (see reduced() in distributed/report.hpp)
  double share = 1;
  std::int64_t all_micro_batches = 0;    ///< K of the whole step, also where only some of them are here
  at::Tensor loss;                       ///< sum over M of weight(M) * L_M: the mean loss over B; scalar
  std::vector<at::Tensor> loss_parts;    ///< what the loss returned behind its first member, averaged as the loss is
  at::Tensor micro_batch_losses;         ///< L_M, one per micro-batch; [K]
  std::vector<std::int64_t> penalised;   ///< which micro-batches were penalised, ascending; by default all K
  std::vector<PenaltyReport> penalties;  ///< one for each, in the order of the sum
  std::int64_t replayed = 0;             ///< how many micro-batches were repeated from a recording, with `.cuda_graph`
  bool skipped = false;          ///< NonFinite::skip_step, or a loss scale that was too large, left this step out
  bool penalty_skipped = false;  ///< NonFinite::skip_penalty left the penalties out of this step's gradient
  at::Tensor gradient_norm;      ///< norm of what this step added to the `.grad` fields; scalar; undefined in `measure`
  at::Tensor loss_scale;         ///< S of this step, a scalar on the device; with a DynamicLossScale
  at::Tensor overflow;           ///< whether S was too large, so that nothing was added to `.grad`: a bool beside it
  /// norm of the penalties' gradient over that of the loss gradient, to choose a strength by: scalar; with
  /// `.gradient_ratio = true`
  at::Tensor gradient_ratio;
  /// the tensors in the model's output for each micro-batch, without a graph; [K][tensors]; with `.keep_outputs = true`
  std::vector<std::vector<at::Tensor>> micro_batch_outputs;

  /// How many are here: K, but for Penalised's part and one of several ranks.
  [[nodiscard]] std::int64_t micro_batches() const { return micro_batch_losses.size(0); }

  /// loss + sum of strength * penalty, a scalar on the device, without a graph.
  [[nodiscard]] at::Tensor objective() const;

  /// The report of the penalty called `name`. Throws OptionError, with the names there are, if there is none.
  [[nodiscard]] const PenaltyReport& penalty(std::string_view name) const;

  /// Tensor `index` of the model's output over the whole mini-batch: its micro-batches behind one another along
  /// `dimension`, in which its samples lie (a model on Along<1> may have them in the second), scalars stacked. Copies.
  /// Throws OptionError unless the step was told to keep outputs, and where their shapes do not fit together so.
  [[nodiscard]] at::Tensor output(std::size_t index = 0, std::int64_t dimension = 0) const;

  /// Throws NonFiniteError, naming the first micro-batch and what is wrong in it, if a loss, a penalty or the gradient
  /// is NaN or infinite. Synchronises a CUDA device.
  void throw_if_not_finite() const;
};

}  // namespace microreg::inline MICROREG_ABI

#if !defined(MICROREG_COMPILED)
#include <microreg/definitions/report.hpp>
#endif
