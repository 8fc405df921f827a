/// @file
/// What is measured about a network between steps, without disturbing its training.
#pragma once

#include "data.hpp"
#include "models.hpp"

namespace cifar {

/// The share of `images` that the network classifies correctly, in evaluation mode, augmentation off.
[[nodiscard]] double accuracy(ImageClassifier& model, const Images& images, const Normalization& normalization);

/// The paper's average micro-batch gradient norm: the mean over micro-batches M of || grad_w L_M ||^2, the squared
/// norm, on `images`, in training mode, augmentation off. BatchNorm statistics and random numbers stay as they are.
[[nodiscard]] double micro_batch_gradient_norm(const std::shared_ptr<ImageClassifier>& model, const Images& images,
                                               const Normalization& normalization, std::int64_t micro_batch_size);

}  // namespace cifar
