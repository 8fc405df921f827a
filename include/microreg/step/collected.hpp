/// @file
/// What the micro-batches of a step came to, and the report of it.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/options.hpp>
#include <microreg/report.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/sampling.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// The losses, outputs and penalties of one step's micro-batches, in their order.
class Collected {
 public:
  /// `parts` are the step's, and outlive this.
  Collected(const MiniBatch& batch, const RegularizerOptions& options, std::vector<Part>& parts)
      : batch_(batch), options_(options), parts_(parts) {}

  /// Takes the count of the next micro-batch's loss, where it says what it is a mean over. What the micro-batch is to
  /// weigh: relative to the first, and not 0, by which a difference would divide; the sums are scaled in the end.
  /// Throws OptionError where the options weigh micro-batches alike, or keep the scale of a sum.
  double weight_by_count(double count) {
    if (options_.reduction == Reduction::total) {
      throw OptionError(
          "reduction is Reduction::total, a sum over samples, and the loss returns a CountedLoss, which is a mean over "
          "counts; leave reduction at Reduction::mean, or return the sum from the loss");
    }
    if (options_.weighting == Weighting::reference) {
      throw OptionError(
          "weighting is Weighting::reference, which counts micro-batches alike, and the loss returns a CountedLoss, "
          "by whose counts they weigh; return the mean from the loss, or leave weighting at Weighting::samples");
    }
    counts_.push_back(count);
    return std::max(count / first_count(), 1e-30);
  }

  /// Takes the loss of the next micro-batch, its parts, and the outputs if they are kept.
  void add(Evaluation& evaluation) {
    losses_.push_back(evaluation.loss.detach());
    loss_parts_.push_back(std::move(evaluation.loss_parts));
    if (options_.keep_outputs) {
      outputs_.push_back(std::move(evaluation.outputs));
    }
  }

  /// Takes the penalties of a micro-batch that is penalised.
  void add_penalised(const Part& part, std::vector<at::Tensor> squared_norms) {
    penalised_.push_back(part);
    squared_norms_.push_back(std::move(squared_norms));
  }

  /// Whether the losses say what they are means over.
  [[nodiscard]] bool counted() const noexcept { return !counts_.empty(); }
  [[nodiscard]] double all_counts() const { return std::accumulate(counts_.begin(), counts_.end(), 0.0); }
  /// What weight_by_count() is relative to.
  [[nodiscard]] double first_count() const { return std::max(counts_.front(), 1.0); }

  /// After the last micro-batch: the weights of the parts become those of the counts, where there are counts. Throws
  /// ModelError where only some have one.
  void weigh_by_counts() {
    if (!counted()) {
      return;
    }
    if (counts_.size() != parts_.size()) {
      throw ModelError("the loss returned a CountedLoss for some micro-batches and not for others");
    }
    const double total = all_counts();
    for (std::size_t i = 0; i < parts_.size(); ++i) {
      parts_[i].weight = total > 0 ? counts_[i] / total : 1.0 / static_cast<double>(parts_.size());
    }
    for (Part& part : penalised_) {
      part.weight = parts_[static_cast<std::size_t>(part.index - parts_.front().index)].weight;
    }
  }

  /// The report of step `step`, which has `count` micro-batches on all ranks, with penalties of these strengths that
  /// count `factor` times; losses without a count are multiplied by `scale`. What is collected is used up. A rank
  /// without a sample has scalars of the options `scalar`.
  Report report(std::int64_t step, std::int64_t count, const std::vector<double>& strengths, double factor,
                double scale, const at::TensorOptions& scalar) {
    const at::NoGradGuard no_grad;
    Report result;
    result.step = step;
    result.all_micro_batches = count;
    result.share = 0;
    for (const Part& part : parts_) {
      result.samples += part.size;
      result.share += part.weight;
    }
    const bool whole = static_cast<std::int64_t>(parts_.size()) == count;
    if (parts_.empty()) {
      result.loss = at::zeros({}, scalar);
      result.micro_batch_losses = at::zeros({0}, scalar);
    } else {
      result.first_micro_batch = parts_.front().index;
      result.share = whole ? 1 : result.share;
      result.micro_batch_losses = at::stack(losses_);
      result.loss = weighted_sum(losses_, parts_, whole);
      result.loss = counted() || scale == 1 ? result.loss : result.loss * scale;
      result.loss_parts = sums_of_loss_parts(result.loss, whole);
      for (at::Tensor& part : result.loss_parts) {
        part = counted() || scale == 1 ? part : part * scale;
      }
    }
    for (const Part& part : penalised_) {
      result.penalised.push_back(part.index - parts_.front().index);
    }
    result.micro_batch_outputs = std::move(outputs_);
    for (std::size_t i = 0; i < batch_.terms(); ++i) {
      const std::string& name = batch_.term(i).name;
      auto [value, norms] = value_and_norms(i, result.loss.options(), whole);
      result.penalties.push_back(
          {name_of(result.penalties, name), strengths[i], factor == 1 ? value : value * factor, norms});
    }
    return result;
  }

 private:
  std::vector<at::Tensor> sums_of_loss_parts(const at::Tensor& loss, bool whole) const {
    const auto same_sizes = [](const at::Tensor& a, const at::Tensor& b) { return a.sizes() == b.sizes(); };
    for (const std::vector<at::Tensor>& parts : loss_parts_) {
      if (!std::equal(parts.begin(), parts.end(), loss_parts_.front().begin(), loss_parts_.front().end(), same_sizes)) {
        throw ModelError(
            "the loss returned parts of another number or shape than for the first micro-batch; return the same "
            "scalars each time");
      }
    }
    std::vector<at::Tensor> result;
    for (std::size_t i = 0; i < loss_parts_.front().size(); ++i) {
      std::vector<at::Tensor> values;
      for (std::size_t m = 0; m < loss_parts_.size(); ++m) {
        const at::Tensor& part = loss_parts_[m][i];
        values.push_back(part.is_floating_point() ? part : part.to(loss.scalar_type()));
        if (options_.reduction != Reduction::mean && !counted()) {
          values.back() = values.back() / parts_[m].size;
        }
      }
      result.push_back(weighted_sum(values, parts_, whole));
    }
    return result;
  }

  /// The penalty `term`, and the norm of each micro-batch that it was taken on.
  [[nodiscard]] std::pair<at::Tensor, at::Tensor> value_and_norms(std::size_t term, const at::TensorOptions& scalar,
                                                                  bool whole) const {
    if (squared_norms_.empty()) {
      return {at::zeros({}, scalar), at::zeros({static_cast<std::int64_t>(parts_.size())}, scalar)};
    }
    std::vector<at::Tensor> values;
    for (const std::vector<at::Tensor>& squared : squared_norms_) {
      values.push_back(squared[term]);
    }
    const at::Tensor norms = at::stack(values).sqrt();
    return {weighted_sum(batch_.term(term).squared ? values : norms.unbind(), penalised_, whole), norms};
  }

  /// `name`, or what a second one of that name is called.
  static std::string name_of(const std::vector<PenaltyReport>& before, const std::string& name) {
    const auto alike = std::count_if(before.begin(), before.end(), [&](const PenaltyReport& penalty) {
      return penalty.name == name || penalty.name.starts_with(name + "#");
    });
    return alike == 0 ? name : text({name, "#", alike + 1});
  }

  /// The sum of weight(M) * values[M] over micro-batches, where the weights of all of the step count as 1 together:
  /// they do already where this rank has the `whole` of it. All weights but the last one's are equal where no losses
  /// are counted, so no host tensor is made.
  at::Tensor weighted_sum(const std::vector<at::Tensor>& values, const std::vector<Part>& parts, bool whole) const {
    double total = 0;
    for (const Part& part : parts_) {
      total += part.weight;
    }
    if (counted()) {
      at::Tensor sum = values.front() * (parts.front().weight / total);
      for (std::size_t i = 1; i < values.size(); ++i) {
        sum = sum + values[i] * (parts[i].weight / total);
      }
      return sum;
    }
    total = whole ? 1 : total;
    const at::Tensor tail = values.back() * (parts.back().weight / total);
    if (values.size() == 1) {
      return tail;
    }
    const at::Tensor head = at::stack(std::vector<at::Tensor>(values.begin(), values.end() - 1));
    return head.sum(0) * (parts.front().weight / total) + tail;
  }

  const MiniBatch& batch_;
  const RegularizerOptions& options_;
  std::vector<Part>& parts_;
  std::vector<double> counts_;  // where the loss gives them
  std::vector<at::Tensor> losses_;
  std::vector<std::vector<at::Tensor>> loss_parts_;
  std::vector<std::vector<at::Tensor>> outputs_;
  std::vector<Part> penalised_;
  std::vector<std::vector<at::Tensor>> squared_norms_;  // of those
};

}  // namespace microreg::inline MICROREG_ABI::detail
