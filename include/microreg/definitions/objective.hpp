/// @file
/// Definitions of step/mini_batch.hpp and step/objective.hpp: what is asked of losses, outputs and the cut.
#pragma once

#include <ATen/ATen.h>
#include <microreg/counted_loss.hpp>
#include <microreg/detail/config.hpp>
#include <microreg/detail/finite.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/options.hpp>
#include <microreg/step/objective.hpp>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

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
                           "InferenceMode (and for a micro-batch that has nothing to learn from, return 0 * "
                           "output.sum())"}));
  }
  const at::Tensor scalar = value.dim() == 0 ? value : value.reshape({});
  return reduction == Reduction::mean ? scalar : scalar / size;
}

MICROREG_INLINE void take_loss(Evaluation& evaluation, LossValue loss, Reduction reduction, std::int64_t size) {
  evaluation.loss = checked_loss(loss.value, loss.count.has_value() ? Reduction::mean : reduction, size);
  evaluation.count = loss.count;
  evaluation.loss_parts = std::move(loss.parts);
}

MICROREG_INLINE void throw_changed_output(const std::string& who) {
  throw ModelError(text({who,
                         " reads the model's output, which the loss has changed in place: use the operation out of "
                         "place there, or clone() first"}));
}

MICROREG_INLINE void require_loss_alone(const std::vector<at::Tensor>& probes, const at::Tensor& loss,
                                        const std::string& who) {
  if (std::any_of(probes.begin(), probes.end(), [&](const at::Tensor& probe) { return !probe.is_same(loss); })) {
    throw_changed_output(who);
  }
}

MICROREG_INLINE void throw_not_recorded(const std::string& name) {
  throw ModelError(text({name,
                         " holds more than tensors on the device (numbers, strings, OnHost or PerSample lists, a type "
                         "with microreg_slice), which a CUDA graph would not see change; pass tensors, or leave "
                         "cuda_graph empty"}));
}

MICROREG_INLINE void add_parameters_of_loss(const torch::nn::Module& loss, std::vector<NamedParameter>& parameters) {
  for (auto& [name, tensor] : named_parameters_of(loss)) {
    parameters.push_back({"loss." + name, tensor});
  }
}

MICROREG_INLINE void add_buffers_of_loss(const torch::nn::Module& loss, std::vector<at::Tensor>& buffers) {
  const std::vector<at::Tensor> own = loss.buffers();
  buffers.insert(buffers.end(), own.begin(), own.end());
}

MICROREG_INLINE LossValue mean_of(const CountedLoss& loss) {
  if (!loss.sum.defined() || !loss.count.defined() || loss.count.numel() != 1) {
    throw ModelError("a CountedLoss needs a sum and a count, each a tensor of one value");
  }
  const double count = loss.count.detach().to(at::kCPU, at::kDouble).item<double>();
  if (!is_finite(count) || count < 0) {
    throw ModelError(text({"the count of the loss is ", count, "; it must be a finite number, at least 0"}));
  }
  return {count > 0 ? loss.sum / count : loss.sum, {}, count};
}

MICROREG_INLINE std::vector<Part> cut(std::int64_t inputs, std::int64_t targets, const RegularizerOptions& options) {
  if (targets >= 0 && inputs != targets) {
    throw BatchError(text({"first dimensions differ: input has ", inputs, " samples, target has ", targets,
                           "; pass the inputs and targets of the same samples"}));
  }
  if (inputs == 0 && options.communicator != nullptr) {
    return {};  // other ranks have some
  }
  if (inputs == 0) {
    throw BatchError("the mini-batch is empty: input has 0 samples; skip empty batches in the data loader");
  }
  const MicroBatches micro_batches(inputs, options.micro_batch_size, options.weighting, options.short_last);
  std::vector<Part> parts;
  for (std::int64_t i = 0; i < micro_batches.count(); ++i) {
    parts.push_back(micro_batches.part(i));
  }
  return parts;
}

#if defined(MICROREG_COMPILED)
template class Objective<at::Tensor, at::Tensor>;
template class PassEvaluation<at::Tensor, at::Tensor, at::Tensor>;
template class ObjectiveOnBatch<at::Tensor, at::Tensor>;
template class StandingBatch<at::Tensor, at::Tensor>;
#endif

}  // namespace microreg::inline MICROREG_ABI::detail
