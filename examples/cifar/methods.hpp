/// @file
/// What each --method does in a step.
#pragma once

#include "models.hpp"
#include "options.hpp"

#include <microreg/report.hpp>

#include <functional>
#include <memory>

namespace cifar {

/// One update of the weights on a mini-batch. What it does depends on `step`, weights and mini-batch alone, and on
/// LibTorch's default random numbers. Throws microreg::NonFiniteError, the weights unchanged, if it diverges.
using Step =
    std::function<microreg::Report(std::int64_t step, const torch::Tensor& images, const torch::Tensor& labels)>;

/// The step of `options.method`. Methods without a penalty are a penalty of strength 0: measured, not differentiated,
/// the same code path at the cost of a plain step. Throws DataError if recorded norms cannot be read.
[[nodiscard]] Step make_step(const Options& options, const std::shared_ptr<ImageClassifier>& model,
                             const std::shared_ptr<torch::optim::SGD>& optimizer);

}  // namespace cifar
