#include "augmentation.hpp"

namespace cifar {

CropAndFlip draw_crop_and_flip(std::int64_t count, std::int64_t padding, const at::Generator& generator) {
  const auto options = torch::TensorOptions(torch::kInt64).device(generator.device());
  const auto integers = [&](std::int64_t high) { return torch::randint(0, high, {count}, generator, options); };
  const torch::Tensor top = integers(2 * padding + 1);
  const torch::Tensor left = integers(2 * padding + 1);
  return {top, left, integers(2).to(torch::kBool)};
}

torch::Tensor crop_and_flip(const torch::Tensor& pixels, std::int64_t padding, const CropAndFlip& draw) {
  const std::int64_t height = pixels.size(2);
  const std::int64_t width = pixels.size(3);
  const auto indices = torch::TensorOptions(torch::kInt64).device(pixels.device());
  const torch::Tensor padded = torch::constant_pad_nd(pixels, {padding, padding, padding, padding});

  const torch::Tensor column = torch::arange(width, indices).unsqueeze(0);
  const torch::Tensor mirrored = torch::where(draw.flip.unsqueeze(1), width - 1 - column, column);
  const torch::Tensor rows = draw.top.unsqueeze(1) + torch::arange(height, indices).unsqueeze(0);  // [N, H]
  const torch::Tensor columns = draw.left.unsqueeze(1) + mirrored;                                 // [N, W]
  const torch::Tensor image = torch::arange(pixels.size(0), indices).view({-1, 1, 1, 1});
  const torch::Tensor channel = torch::arange(pixels.size(1), indices).view({1, -1, 1, 1});
  return padded.index({image, channel, rows.view({-1, 1, height, 1}), columns.view({-1, 1, 1, width})});
}

}  // namespace cifar
