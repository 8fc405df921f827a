/// @file
/// What is measured about a network between steps, without disturbing its training.
#pragma once

#include "data.hpp"
#include "models.hpp"

#include <microreg/distributed/communicator.hpp>

#include <memory>
#include <vector>

namespace cifar {

/// The share of `images` that the network classifies correctly, in evaluation mode, augmentation off. Several ranks
/// divide the images, and all of them get the result.
[[nodiscard]] double accuracy(ImageClassifier& model, const Images& images, const Normalization& normalization,
                              Layout layout = Layout::contiguous, microreg::Communicator* ranks = nullptr);

/// The mean over micro-batches M of `images` of a penalty R_M, in training mode, augmentation off. The paper's average
/// micro-batch gradient norm, the mean of || grad_w L_M ||^2, comes first, then what each of `monitors` names.
/// BatchNorm statistics and random numbers stay as they are.
[[nodiscard]] std::vector<double> measured_penalties(const std::shared_ptr<ImageClassifier>& model,
                                                     const Images& images, const Normalization& normalization,
                                                     std::int64_t micro_batch_size, std::int64_t workers,
                                                     const std::vector<Monitor>& monitors = {},
                                                     Layout layout = Layout::contiguous,
                                                     const std::shared_ptr<microreg::Communicator>& ranks = nullptr);

}  // namespace cifar
