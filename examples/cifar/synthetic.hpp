/// @file
/// Procedurally generated images that stand in for CIFAR where there is no data.
#pragma once

#include "data.hpp"

#include <cstdint>

namespace cifar {

/// 32x32 RGB images in 10 classes: five patterns (horizontal stripes, vertical stripes, checks, rings, rays), each
/// coarse or fine. The pattern fills a soft window of random place, size, colour, phase and contrast over a blob of
/// colour that hints at the pattern, before a second, fainter window of another class, a gradient and noise. 15 % of
/// the training labels are drawn at random, so that a network which memorises them pays on the test images, which are
/// labelled right. The classes survive a horizontal flip. Deterministic in the seed.
[[nodiscard]] Data synthetic_data(std::int64_t train_size, std::int64_t test_size, std::int64_t seed);

}  // namespace cifar
