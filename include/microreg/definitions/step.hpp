/// @file
/// The step: the loop over micro-batches, its report, and the promise that nothing is left behind by a failed one.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/fused/scope.hpp>
#include <microreg/parameters.hpp>
#include <microreg/report.hpp>
#include <microreg/step/double_backward.hpp>
#include <microreg/step/finite_difference.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/probes.hpp>
#include <microreg/step/sampling.hpp>
#include <microreg/step/snapshot.hpp>
#include <microreg/step/tensor_lists.hpp>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace microreg::detail {

MICROREG_INLINE void check_output(const at::Tensor& output) {
  if (output.defined() && !output.is_floating_point() && !output.is_complex()) {
    throw ModelError(text({"the model's output is ", output.scalar_type(), " of shape ", output.sizes(),
                           ", which has no gradient; return floating-point logits or predictions"}));
  }
}

MICROREG_INLINE at::Tensor checked_loss(const at::Tensor& value, Reduction reduction, std::int64_t size) {
  if (!value.defined() || value.numel() != 1) {
    throw ModelError(text({"the loss has shape ", value.defined() ? Piece(value.sizes()) : Piece("(undefined)"),
                           ", it must be a scalar: reduce it to the mean over samples, or to the sum with .reduction = "
                           "Reduction::sum"}));
  }
  if (!value.is_floating_point() || !value.requires_grad()) {
    throw ModelError(text({"the loss (", value.scalar_type(),
                           ") carries no graph; compute it from the model's output without detach(), NoGradGuard or "
                           "InferenceMode"}));
  }
  const at::Tensor scalar = value.dim() == 0 ? value : value.reshape({});
  return reduction == Reduction::sum ? scalar / size : scalar;
}

MICROREG_INLINE std::vector<Part> cut(std::int64_t inputs, std::int64_t targets, const RegularizerOptions& options) {
  if (targets >= 0 && inputs != targets) {
    throw BatchError(text({"first dimensions differ: input has ", inputs, " samples, target has ", targets,
                           "; pass the inputs and targets of the same samples"}));
  }
  if (inputs == 0) {
    throw BatchError("the mini-batch is empty: input has 0 samples; skip empty batches in the data loader");
  }
  const MicroBatches micro_batches(inputs, options.micro_batch_size, options.weighting);
  std::vector<Part> parts;
  for (std::int64_t i = 0; i < micro_batches.count(); ++i) {
    parts.push_back(micro_batches.part(i));
  }
  return parts;
}

/// The device that all of `tensors` share, if they do.
inline std::optional<c10::Device> common_device(const std::vector<at::Tensor>& tensors) {
  const c10::Device device = tensors.front().device();
  const bool same =
      std::all_of(tensors.begin(), tensors.end(), [&](const at::Tensor& tensor) { return tensor.device() == device; });
  return same ? std::optional(device) : std::nullopt;
}

/// Throws BatchError for a tensor, OptionError for a generator, on another device than the model.
inline void check_devices(const MiniBatch& batch, const RegularizerOptions& options,
                          const std::vector<at::Tensor>& parameters) {
  const auto device = common_device(parameters);
  if (!device.has_value()) {
    return;  // A model spread over devices knows where its inputs go.
  }
  batch.for_each_tensor([&](const at::Tensor& tensor, const std::string& path) {
    if (tensor.defined() && tensor.device() != *device) {
      throw BatchError(
          text({path, " is on ", tensor.device(), ", the model on ", *device, "; move it with .to(", *device, ")"}));
    }
  });
  if (options.generator.has_value() && options.generator->device().type() != device->type()) {
    throw OptionError(text({"generator is on ", options.generator->device(), ", the model on ", *device,
                            "; make the generator on the model's device"}));
  }
}

/// Adds `sums` to the `.grad` fields of `parameters`, outside of any graph.
inline void add_to_grad(const std::vector<at::Tensor>& parameters, const std::vector<at::Tensor>& sums) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> into;
  std::vector<at::Tensor> from;
  std::vector<std::size_t> without;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    if (!sums[i].defined()) {
      continue;
    }
    if (parameters[i].grad().defined()) {
      into.push_back(parameters[i].grad());
      from.push_back(sums[i]);
    } else {
      without.push_back(i);
    }
  }
  if (!into.empty()) {
    at::_foreach_add_(into, from);
  }
  for (const std::size_t i : without) {  // last, since nothing throws any more
    parameters[i].mutable_grad() = sums[i];
  }
}

/// strength(step) of every penalty, times the common factor.
inline std::vector<double> strengths_at(const MiniBatch& batch, const RegularizerOptions& options, std::int64_t step) {
  const double common = options.strength.at(step);
  std::vector<double> result;
  for (std::size_t i = 0; i < batch.terms(); ++i) {
    result.push_back(common * batch.term(i).strength.at(step));
  }
  return result;
}

/// One step, from its checks to its report.
class Step {
 public:
  /// Throws before anything is changed.
  Step(MiniBatch& batch, const RegularizerOptions& options, std::int64_t step)
      : batch_(batch),
        options_(options),
        step_(step),
        strengths_(strengths_at(batch, options, step)),
        parameters_(trainable(batch.parameters(), options.select)),
        parts_(batch.parts()),
        snapshot_(checked_snapshot()) {}

  /// What `steps()` returns. If it throws, buffers and generators are put back.
  template <class Steps>
  Report guarded(const Steps& steps) const {
    try {
      return steps();
    } catch (...) {
      snapshot_.restore();
      throw;
    }
  }

  [[nodiscard]] const Parameters& parameters() const noexcept { return parameters_; }
  [[nodiscard]] const Snapshot& snapshot() const noexcept { return snapshot_; }
  [[nodiscard]] std::int64_t count() const noexcept { return parts_.front().count; }
  [[nodiscard]] const std::vector<double>& strengths() const noexcept { return strengths_; }

  /// Calls `estimate(part, weights, keep)` for every micro-batch and collects the report. `estimate` shows its first
  /// evaluation to `keep`, and returns the squared gradient norms, one a penalty, where weights.penalty is not 0.
  template <class Estimate>
  Report run(const Choice& choice, const Estimate& estimate) {
    const at::AutoGradMode enable_grad(true);
    std::vector<std::vector<at::Tensor>> squared_norms;
    for (const Part& part : parts_) {
      const bool penalised = choice.chosen[static_cast<std::size_t>(part.index)];
      const Weights weights{part.weight, penalised ? part.weight * choice.factor : 0.0, strengths_};
      auto squared = estimate(part, weights, [&](Evaluation& evaluation) {
        losses_.push_back(evaluation.loss.detach());
        loss_parts_.push_back(std::move(evaluation.loss_parts));
        if (options_.keep_outputs) {
          outputs_.push_back(std::move(evaluation.outputs));
        }
      });
      if (penalised) {
        chosen_.push_back(part);
        squared_norms.push_back(std::move(squared));
      }
    }
    return report(choice, squared_norms);
  }

 private:
  /// The checks that need the parameters, and then the snapshot.
  Snapshot checked_snapshot() const {
    check_devices(batch_, options_, parameters_.tensors);
    return {batch_.buffers(), parameters_.tensors.front().device(), options_.generator};
  }

  Report report(const Choice& choice, const std::vector<std::vector<at::Tensor>>& squared_norms) {
    const at::NoGradGuard no_grad;
    Report result;
    result.step = step_;
    for (const Part& part : parts_) {
      result.samples += part.size;
    }
    for (const Part& part : chosen_) {
      result.penalised.push_back(part.index - parts_.front().index);
    }
    result.micro_batch_losses = at::stack(losses_);
    result.loss = weighted_sum(losses_, parts_);
    require_equal_parts();
    for (std::size_t i = 0; i < loss_parts_.front().size(); ++i) {
      std::vector<at::Tensor> values;
      for (const std::vector<at::Tensor>& parts : loss_parts_) {
        values.push_back(parts.at(i).is_floating_point() ? parts.at(i) : parts.at(i).to(result.loss.scalar_type()));
        if (options_.reduction == Reduction::sum) {
          values.back() = values.back() / parts_[values.size() - 1].size;
        }
      }
      result.loss_parts.push_back(weighted_sum(values, parts_));
    }
    result.micro_batch_outputs = std::move(outputs_);
    for (std::size_t p = 0; p < batch_.terms(); ++p) {
      const TermInfo& term = batch_.term(p);
      std::vector<at::Tensor> values;
      for (const std::vector<at::Tensor>& squared : squared_norms) {
        values.push_back(squared[p]);
      }
      const at::Tensor norms = values.empty() ? at::empty({0}, result.loss.options()) : at::stack(values).sqrt();
      if (!term.squared) {
        values = values.empty() ? values : norms.unbind();
      }
      at::Tensor value = values.empty() ? at::zeros({}, result.loss.options()) : weighted_sum(values, chosen_);
      result.penalties.push_back({term.name, strengths_[p], choice.factor == 1 ? value : value * choice.factor, norms});
    }
    return result;
  }

  void require_equal_parts() const {
    const auto same_sizes = [](const at::Tensor& a, const at::Tensor& b) { return a.sizes() == b.sizes(); };
    for (const std::vector<at::Tensor>& parts : loss_parts_) {
      if (!std::equal(parts.begin(), parts.end(), loss_parts_.front().begin(), loss_parts_.front().end(), same_sizes)) {
        throw ModelError(
            "the loss returned parts of another number or shape than for the first micro-batch; return the same "
            "scalars each time");
      }
    }
  }

  /// The sum of weight(M) * values[M] over micro-batches, where the weights of all of the step count as 1 together. All
  /// weights but the last one's are equal, so no host tensor is made.
  at::Tensor weighted_sum(const std::vector<at::Tensor>& values, const std::vector<Part>& parts) const {
    double total = 0;
    for (const Part& part : parts_) {
      total += part.weight;
    }
    const double all = parts_.size() == static_cast<std::size_t>(count()) ? 1 : total;
    const at::Tensor tail = values.back() * (parts.back().weight / all);
    if (values.size() == 1) {
      return tail;
    }
    const at::Tensor head = at::stack(std::vector<at::Tensor>(values.begin(), values.end() - 1));
    return head.sum(0) * (parts.front().weight / all) + tail;
  }

  MiniBatch& batch_;
  const RegularizerOptions& options_;
  std::int64_t step_;
  std::vector<double> strengths_;
  Parameters parameters_;
  std::vector<Part> parts_;
  Snapshot snapshot_;

  std::vector<Part> chosen_;
  std::vector<at::Tensor> losses_;
  std::vector<std::vector<at::Tensor>> loss_parts_;
  std::vector<std::vector<at::Tensor>> outputs_;
};

/// Throws where the input was computed with a graph, which the further passes of a difference would not repeat.
inline void require_plain_input(const MiniBatch& batch) {
  batch.for_each_tensor([](const at::Tensor& tensor, const std::string& path) {
    if (tensor.defined() && tensor.grad_fn() != nullptr) {
      throw ModelError(text({path,
                             " carries a graph, which the further passes of a difference do not repeat; detach() it, "
                             "compute it inside the model, or use Exact"}));
    }
  });
}

/// The gradient of weight * loss, added to `sums`.
inline void add_loss_gradient(const at::Tensor& loss, double weight, const Parameters& parameters, bool retain_graph,
                              std::vector<at::Tensor>& sums) {
  accumulate(sums, gradients({loss}, parameters.tensors, {}, retain_graph, /*create_graph=*/false, "the loss"), weight);
}

MICROREG_INLINE Report take_step(MiniBatch& batch, const RegularizerOptions& options, std::int64_t step, Proof& proof) {
  Step loop(batch, options, step);
  Proof next_proof = proof;
  return loop.guarded([&] {
    const Parameters& parameters = loop.parameters();
    std::vector<at::Tensor> sums(parameters.tensors.size());
    std::vector<at::Tensor> loss_sums(options.gradient_ratio ? sums.size() : 0);
    std::optional<FiniteDifference> difference;
    if (const auto settings = difference_settings(options.estimator)) {
      require_plain_input(batch);
      difference.emplace(*settings, parameters, next_proof, options.fused, options.check_finite);
    }
    const FusedScope fused(options.fused && !difference.has_value());
    Report report =
        loop.run(choose_penalised(options.sampling, step, loop.count()),
                 [&](const Part& part, const Weights& weights, const auto& keep) -> std::vector<at::Tensor> {
                   const auto keep_all = [&](Evaluation& evaluation) {
                     keep(evaluation);
                     if (options.gradient_ratio) {
                       add_loss_gradient(evaluation.loss, weights.loss, parameters, /*retain_graph=*/true, loss_sums);
                     }
                   };
                   if (difference.has_value() && weights.penalty != 0) {
                     return (*difference)(batch, part, weights, loop.snapshot(), sums, keep_all);
                   }
                   const auto evaluation = batch.evaluate(part, {});
                   keep_all(*evaluation);
                   if (weights.penalty != 0) {
                     return double_backward(batch, *evaluation, weights, parameters, sums);
                   }
                   add_loss_gradient(evaluation->loss, weights.loss, parameters, /*retain_graph=*/false, sums);
                   return {};
                 });
    const at::TensorOptions scalar = report.loss.options();
    report.gradient_norm = squared_norm(sums, scalar).sqrt();
    if (options.gradient_ratio) {
      report.gradient_ratio =
          squared_norm(differences(sums, loss_sums), scalar).sqrt() * over_norm(squared_norm(loss_sums, scalar), 1.0);
    }
    if (options.check_finite == CheckFinite::always ||
        (options.check_finite == CheckFinite::on_cpu && report.loss.is_cpu())) {
      report.throw_if_not_finite();
    }
    if (difference.has_value()) {
      difference->finish();
    }
    add_to_grad(parameters.tensors, sums);
    proof = next_proof;
    return report;
  });
}

MICROREG_INLINE Report measure_step(MiniBatch& batch, const RegularizerOptions& options) {
  Step loop(batch, options, 0);
  return loop.guarded([&] {
    Report report =
        loop.run(all_penalised(loop.count()), [&](const Part& part, const Weights& /*weights*/, const auto& keep) {
          const auto evaluation = batch.evaluate(part, {});
          keep(*evaluation);
          return squared_norms(batch, *evaluation, loop.parameters());
        });
    loop.snapshot().restore();
    return report;
  });
}

}  // namespace microreg::detail
