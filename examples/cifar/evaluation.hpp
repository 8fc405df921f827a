/// @file
/// What is measured about a network between steps, without disturbing its training.
#pragma once

#include "data.hpp"
#include "models.hpp"

#include <memory>
#include <vector>

namespace cifar {

/// The share of `images` that the network classifies correctly, in evaluation mode, augmentation off.
[[nodiscard]] double accuracy(ImageClassifier& model, const Images& images, const Normalization& normalization,
                              Layout layout = Layout::contiguous);

/// The mean over micro-batches M of `images` of a penalty R_M, in training mode, augmentation off. The paper's average
/// micro-batch gradient norm, the mean of || grad_w L_M ||^2, comes first, then what each of `monitors` names.
/// BatchNorm statistics and random numbers stay as they are.
[[nodiscard]] std::vector<double> measured_penalties(const std::shared_ptr<ImageClassifier>& model,
                                                     const Images& images, const Normalization& normalization,
                                                     std::int64_t micro_batch_size, std::int64_t workers,
                                                     const std::vector<Monitor>& monitors = {},
                                                     Layout layout = Layout::contiguous);

}  // namespace cifar
