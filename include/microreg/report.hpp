/// @file
/// What a step found out. Everything is a tensor on the model's device: reading a number from it (`.item()`, printing)
/// is what synchronises a CUDA device, the step itself does not.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/StringUtil.h>
#include <microreg/error.hpp>

#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace microreg {

/// One penalty over the micro-batches of a mini-batch.
struct PenaltyReport {
  std::string name;
  double strength = 0;  ///< the factor in this step's objective
  at::Tensor value;     ///< sum over M of weight(M) * R_M, without the strength; scalar. Where only a share of the
                        ///< micro-batches or steps is penalised, its unbiased estimate from those
  at::Tensor micro_batch_norms;  ///< || grad s_M ||, the unsquared norm, one per penalised micro-batch
};

/// The outcome of `Regularizer::backward` (and, without gradients, of `measure`).
struct Report {
  std::int64_t step = 0;                ///< counted from 0
  std::int64_t samples = 0;             ///< |B|
  at::Tensor loss;                      ///< sum over M of weight(M) * L_M: the mean loss over B; scalar
  at::Tensor micro_batch_losses;        ///< L_M, one per micro-batch; [K]
  std::vector<std::int64_t> penalised;  ///< which micro-batches were penalised, ascending; by default all K
  std::vector<PenaltyReport> penalties;
  at::Tensor gradient_norm;  ///< norm of what this step added to the `.grad` fields; scalar; undefined in `measure`

  [[nodiscard]] std::int64_t micro_batches() const { return micro_batch_losses.size(0); }

  /// loss + sum of strength * penalty, a scalar on the device, without a graph.
  [[nodiscard]] at::Tensor objective() const {
    at::Tensor sum = loss;
    for (const PenaltyReport& penalty : penalties) {
      sum = sum + penalty.value * penalty.strength;
    }
    return sum;
  }

  /// The report of the penalty called `name`. Throws OptionError, with the names there are, if there is none.
  [[nodiscard]] const PenaltyReport& penalty(std::string_view name) const {
    std::string names;
    for (const PenaltyReport& candidate : penalties) {
      if (candidate.name == name) {
        return candidate;
      }
      names += c10::str(names.empty() ? "" : ", ", candidate.name);
    }
    throw OptionError(c10::str("the report has no penalty named ", name, "; it has: ", names));
  }

  /// Throws NonFiniteError, naming the first micro-batch and what is wrong in it, if a loss, a penalty or the gradient
  /// is NaN or infinite. Synchronises a CUDA device.
  void throw_if_not_finite() const {
    check(micro_batch_losses, "the loss", [](std::int64_t i) { return i; });
    for (const PenaltyReport& penalty : penalties) {
      check(penalty.micro_batch_norms, c10::str("the gradient norm of penalty ", penalty.name),
            [this](std::int64_t i) { return penalised.empty() ? i : penalised[static_cast<std::size_t>(i)]; });
    }
    if (gradient_norm.defined() && !std::isfinite(gradient_norm.item<double>())) {
      throw NonFiniteError(c10::str("the gradient of the objective is ", gradient_norm.item<double>(), " at step ",
                                    step, " although every loss and penalty is finite; ", remedy),
                           0);
    }
  }

 private:
  static constexpr const char* remedy =
      "lower the learning rate or the strength, check the input for NaN, or use float32 where half types overflow";

  /// `micro_batch_of` gives the micro-batch that a position in `values` belongs to.
  template <class MicroBatchOf>
  void check(const at::Tensor& values, const std::string& what, const MicroBatchOf& micro_batch_of) const {
    const at::Tensor on_host = values.to(at::kCPU, at::kDouble);
    const double* data = on_host.const_data_ptr<double>();
    for (std::int64_t i = 0; i < on_host.numel(); ++i) {
      if (!std::isfinite(data[i])) {
        const std::int64_t micro_batch = micro_batch_of(i);
        throw NonFiniteError(c10::str(what, " is ", data[i], " in micro-batch ", micro_batch, " of ", micro_batches(),
                                      " at step ", step, "; ", remedy),
                             micro_batch);
      }
    }
  }
};

}  // namespace microreg
