/// @file
/// The networks that are measured, by name.
#pragma once

#include "models.hpp"  // the CIFAR trainer's

#include <memory>
#include <span>
#include <string_view>

namespace overhead {

struct Network {
  std::string_view name;
  bool batch_norm;
  bool convolutional;  ///< whether a channels-last layout makes a difference
  std::shared_ptr<cifar::ImageClassifier> (*make)();
};

[[nodiscard]] std::span<const Network> networks();

/// The network called `name`, which must be one of networks().
[[nodiscard]] const Network& network(std::string_view name);

/// An encoder in the manner of ViT (Dosovitskiy et al., arXiv:2010.11929) for 32x32 images: patches of 4x4, width 128,
/// four pre-norm blocks with four heads, mean over the tokens. Attention is written out as two matrix products and a
/// softmax: LibTorch's fused attention has no double backward.
[[nodiscard]] std::shared_ptr<cifar::ImageClassifier> make_vit();

/// Perceptrons of the widths 784, 2048, 2048, 10 and 16, 32, 10: wide layers beside few samples, and a step that is
/// nearly nothing but calls.
[[nodiscard]] std::shared_ptr<cifar::ImageClassifier> make_mlp();
[[nodiscard]] std::shared_ptr<cifar::ImageClassifier> make_small_mlp();

}  // namespace overhead
