#include "augmentation.hpp"
#include "catch.hpp"
#include "random_streams.hpp"

namespace {

/// Pixel by pixel: out(y, x) is the padded image at (top + y, left + x), x counted from the right where flipped.
torch::Tensor one_by_one(const torch::Tensor& pixels, std::int64_t padding, const cifar::CropAndFlip& draw) {
  torch::Tensor result = torch::zeros_like(pixels);
  const std::int64_t height = pixels.size(2);
  const std::int64_t width = pixels.size(3);
  for (std::int64_t n = 0; n < pixels.size(0); ++n) {
    for (std::int64_t y = 0; y < height; ++y) {
      for (std::int64_t x = 0; x < width; ++x) {
        const std::int64_t from_y = y + draw.top[n].item<std::int64_t>() - padding;
        const std::int64_t from_x =
            (draw.flip[n].item<bool>() ? width - 1 - x : x) + draw.left[n].item<std::int64_t>() - padding;
        if (from_y >= 0 && from_y < height && from_x >= 0 && from_x < width) {
          result.select(0, n).select(1, y).select(1, x).copy_(pixels.select(0, n).select(1, from_y).select(1, from_x));
        }
      }
    }
  }
  return result;
}

}  // namespace

TEST_CASE("crop and flip of a batch is that of each image alone") {
  torch::manual_seed(1);
  const torch::Tensor pixels = torch::randint(256, {6, 3, 8, 10}).to(torch::kUInt8);
  const auto draw =
      cifar::draw_crop_and_flip(6, 2, cifar::stream_generator(torch::kCPU, 3, cifar::Stream::augmentation));
  CHECK(torch::equal(cifar::crop_and_flip(pixels, 2, draw), one_by_one(pixels, 2, draw)));
}

TEST_CASE("the middle crop without a flip is the image itself") {
  const torch::Tensor pixels = torch::randint(256, {2, 3, 8, 8}).to(torch::kUInt8);
  const torch::Tensor middle = torch::full({2}, 4, torch::kInt64);
  CHECK(torch::equal(cifar::crop_and_flip(pixels, 4, {middle, middle, torch::zeros({2}, torch::kBool)}), pixels));
}

TEST_CASE("draws cover every crop and both directions, and repeat with the seed") {
  const auto generator = [] { return cifar::stream_generator(torch::kCPU, 3, cifar::Stream::augmentation, 5); };
  const auto draw = cifar::draw_crop_and_flip(2000, 4, generator());
  for (const torch::Tensor& offset : {draw.top, draw.left}) {
    CHECK(torch::equal(std::get<0>(torch::_unique(offset)), torch::arange(9)));
  }
  const double flipped = draw.flip.to(torch::kDouble).mean().item<double>();
  CHECK(flipped > 0.45);  // Five standard deviations of 2,000 fair coins are 0.056.
  CHECK(flipped < 0.55);
  CHECK(torch::equal(draw.top, cifar::draw_crop_and_flip(2000, 4, generator()).top));
}
