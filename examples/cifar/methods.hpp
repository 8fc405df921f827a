/// @file
/// What each --method does in a step.
#pragma once

#include "models.hpp"
#include "options.hpp"

#include <microreg/options.hpp>
#include <microreg/report.hpp>

#include <functional>

namespace cifar {

/// One update of the weights on a mini-batch. Throws microreg::NonFiniteError, the weights unchanged, if it diverges.
using Step = std::function<microreg::Report(const torch::Tensor& images, const torch::Tensor& labels)>;

/// Plain SGD is a penalty of strength 0: measured, not differentiated, the same code path at the cost of a plain step.
[[nodiscard]] Step make_step(Method method, std::shared_ptr<ImageClassifier> model,
                             std::shared_ptr<torch::optim::Optimizer> optimizer, microreg::RegularizerOptions options);

}  // namespace cifar
