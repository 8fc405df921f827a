/// @file
/// Images with labels, and how they become a network's input.
#pragma once

#include "options.hpp"

#include <torch/torch.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace cifar {

/// Images as bytes, a quarter of the memory of floats. They stay bytes until after augmentation, so that padding is
/// black as usual.
struct Images {
  torch::Tensor pixels;  ///< uint8 [N, 3, S, S]
  torch::Tensor labels;  ///< int64 [N]

  [[nodiscard]] std::int64_t size() const { return labels.size(0); }
};

/// Per-channel mean and standard deviation of pixels scaled to [0, 1].
struct Normalization {
  std::array<double, 3> mean;
  std::array<double, 3> deviation;
};

struct Data {
  Images train;
  Images validation;  ///< what the best checkpoint is chosen on: held-out training images, or the test images
  Images test;
  std::int64_t classes = 10;
  Normalization normalization{};
  std::vector<std::string> notes;  ///< what the user should know about the files
};

/// A file or folder that does not hold what it should: the message names it, the offset and what was expected.
class DataError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Loads what `options` ask for: source, sizes, image size. On the CPU. Throws DataError and UsageError.
[[nodiscard]] Data load_data(const Options& options);

/// The first `count` images; all if `count` is 0.
[[nodiscard]] Images first(const Images& images, std::int64_t count);

/// Averages blocks of `factor` x `factor` pixels, rounded to whole bytes.
[[nodiscard]] torch::Tensor pool(const torch::Tensor& pixels, std::int64_t factor);

/// Bytes to normalized floats.
[[nodiscard]] torch::Tensor normalized(const torch::Tensor& pixels, const Normalization& normalization);

/// The same in the memory layout that the network has.
[[nodiscard]] torch::Tensor network_input(const torch::Tensor& pixels, const Normalization& normalization,
                                          Layout layout);

}  // namespace cifar
