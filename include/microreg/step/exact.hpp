/// @file
/// One micro-batch of an exact step: forward pass, loss, probes, double backward.
#pragma once

#include <ATen/core/Tensor.h>
#include <microreg/parameters.hpp>
#include <microreg/step/double_backward.hpp>
#include <microreg/step/gradients.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/probes.hpp>
#include <microreg/step/scaling.hpp>
#include <microreg/step/tensor_lists.hpp>
#include <microreg/step/visitor.hpp>

#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// The gradient of weight * loss.
inline WeightedGradients loss_gradient(const at::Tensor& loss, const Factor& weight, const Scale& scale,
                                       const Parameters& parameters, bool retain_graph) {
  return {gradients({loss}, parameters.tensors, scale.seeds(loss), retain_graph, /*create_graph=*/false, "the loss"),
          scale.over(weight)};
}

/// What the micro-batches of an exact step have in common.
struct ExactTask {
  const Parameters& parameters;
  HalfRange range;
  bool with_loss_gradient = false;  ///< RegularizerOptions::gradient_ratio
};

/// The gradients of loss and penalties on one micro-batch.
inline Estimated exact_estimate(const ExactTask& task, MiniBatch& batch, const Part& part, const Weights& weights,
                                const Visitor& visitor) {
  const Scale& scale = task.range.scale;
  visitor.begin();
  const auto evaluation = batch.evaluate(part, {});
  visitor.keep(*evaluation);
  auto probes = weights.penalty != 0 ? all_probes(batch, *evaluation) : std::vector<std::vector<at::Tensor>>();
  visitor.go_on(*evaluation, probes, /*through_first=*/false);
  std::vector<WeightedGradients> of_loss;
  if (task.with_loss_gradient) {
    of_loss.push_back(
        loss_gradient(evaluation->loss, weights.on_loss(), scale, task.parameters, /*retain_graph=*/true));
  }
  Estimated result;
  if (weights.penalty != 0) {
    result = double_backward(batch, *evaluation, std::move(probes), weights, task.parameters, task.range);
  } else {
    result.gradients.push_back(
        loss_gradient(evaluation->loss, weights.on_loss(), scale, task.parameters, evaluation->shares_graph));
  }
  result.loss_gradient = std::move(of_loss);
  return result;
}

}  // namespace microreg::inline MICROREG_ABI::detail
