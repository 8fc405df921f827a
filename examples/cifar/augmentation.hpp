/// @file
/// Random crop and horizontal flip of a whole batch at once.
#pragma once

#include <torch/torch.h>

#include <cstdint>

namespace cifar {

/// One draw for each image: where the crop begins in the padded image, and whether it is mirrored.
struct CropAndFlip {
  torch::Tensor top;   ///< int64 [N], 0 to 2 * padding
  torch::Tensor left;  ///< int64 [N], 0 to 2 * padding
  torch::Tensor flip;  ///< bool [N]
};

/// Draws uniformly, on the generator's device.
[[nodiscard]] CropAndFlip draw_crop_and_flip(std::int64_t count, std::int64_t padding, const at::Generator& generator);

/// Pads `pixels` [N, C, H, W] by `padding` zeros on each side, cuts out H x W at (top, left) and mirrors: one gather
/// for the whole batch, on its device.
[[nodiscard]] torch::Tensor crop_and_flip(const torch::Tensor& pixels, std::int64_t padding, const CropAndFlip& draw);

}  // namespace cifar
