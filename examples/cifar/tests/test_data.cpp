#include "data.hpp"

#include <fstream>
#include <set>

#include "catch.hpp"
#include "data_order.hpp"
#include "random_streams.hpp"
#include "synthetic.hpp"
#include "temporary_folder.hpp"

TEST_CASE("pooling averages blocks and rounds to bytes") {
  const torch::Tensor pixels = torch::tensor({0, 1, 10, 20, 2, 2, 30, 43}, torch::kUInt8).view({1, 1, 2, 4});
  // (0 + 1 + 2 + 2) / 4 = 1.25, (10 + 20 + 30 + 43) / 4 = 25.75.
  CHECK(torch::equal(cifar::pool(pixels, 2), torch::tensor({1, 26}, torch::kUInt8).view({1, 1, 1, 2})));
}

TEST_CASE("normalization subtracts the mean and divides by the deviation, channel by channel") {
  const torch::Tensor pixels = torch::tensor({51, 102, 255}, torch::kUInt8).view({1, 3, 1, 1});
  const torch::Tensor expected = torch::tensor({(0.2 - 0.1) / 0.5, (0.4 - 0.2) / 0.25, (1.0 - 0.3) / 0.2});
  CHECK(torch::allclose(cifar::normalized(pixels, {{0.1, 0.2, 0.3}, {0.5, 0.25, 0.2}}).view({-1}), expected));
}

TEST_CASE("a step's samples depend on seed and step alone, and every epoch takes each sample once") {
  cifar::DataOrder order(10, 4, 1);
  torch::Tensor all = torch::empty({0}, torch::kInt64);
  for (std::int64_t step = 0; step < 5; ++step) {  // 20 samples: two epochs, the third batch is part of both
    const torch::Tensor batch = order.batch(step);
    CHECK(batch.size(0) == 4);
    CHECK(torch::equal(batch, cifar::DataOrder(10, 4, 1).batch(step)));
    all = torch::cat({all, batch});
  }
  const torch::Tensor epochs = std::get<0>(all.view({2, 10}).sort(1));
  CHECK(torch::equal(epochs, torch::arange(10).expand({2, 10})));
  CHECK_FALSE(torch::equal(all.narrow(0, 0, 10), all.narrow(0, 10, 10)));
  CHECK_FALSE(torch::equal(cifar::DataOrder(10, 10, 1).batch(0), cifar::DataOrder(10, 10, 2).batch(0)));
}

TEST_CASE("streams, seeds and indices give seeds of their own") {
  std::set<std::uint64_t> seeds;
  for (const auto stream : {cifar::Stream::weights, cifar::Stream::order, cifar::Stream::augmentation}) {
    for (std::int64_t seed = 0; seed < 10; ++seed) {
      for (std::int64_t index = 0; index < 10; ++index) {
        seeds.insert(cifar::stream_seed(seed, stream, index));
      }
    }
  }
  CHECK(seeds.size() == 300);
}

TEST_CASE("synthetic images repeat with the seed, have all classes and differ between training and test") {
  const auto data = cifar::synthetic_data(500, 500, 4);
  const auto again = cifar::synthetic_data(500, 500, 4);
  CHECK(data.train.pixels.sizes() == torch::IntArrayRef{500, 3, 32, 32});
  CHECK(data.train.pixels.scalar_type() == torch::kUInt8);
  CHECK(torch::equal(data.train.pixels, again.train.pixels));
  CHECK(torch::equal(data.test.labels, again.test.labels));
  CHECK(torch::equal(std::get<0>(torch::_unique(data.test.labels)), torch::arange(10)));
  CHECK_FALSE(torch::equal(data.train.pixels, data.test.pixels));
  CHECK_FALSE(torch::equal(data.train.pixels, cifar::synthetic_data(500, 500, 5).train.pixels));
}

TEST_CASE(
    "held-out images are training images that are not trained on; the reference split validates on the test images") {
  cifar::Options options{.split = cifar::Split::holdout, .train_size = 100, .validation_size = 50, .test_size = 10};
  options.batch_size = 100;
  const auto held_out = cifar::load_data(options);
  const auto all = cifar::synthetic_data(150, 10, 0);
  CHECK(torch::equal(held_out.train.pixels, all.train.pixels.narrow(0, 0, 100)));
  CHECK(torch::equal(held_out.validation.pixels, all.train.pixels.narrow(0, 100, 50)));
  CHECK(torch::equal(held_out.validation.labels, all.train.labels.narrow(0, 100, 50)));
  CHECK(torch::equal(held_out.test.pixels, all.test.pixels));
  options.split = cifar::Split::reference;
  const auto reference = cifar::load_data(options);
  CHECK(reference.train.size() == 100);
  CHECK(torch::equal(reference.validation.pixels, reference.test.pixels));
}

TEST_CASE("a fifth of a folder's training images is held out, in either split") {
  const TemporaryFolder folder;
  for (int file = 0; file < 6; ++file) {
    const std::string name = file < 5 ? "data_batch_" + std::to_string(file + 1) + ".bin" : "test_batch.bin";
    std::ofstream stream(folder.path() / name, std::ios::binary);
    stream.put(static_cast<char>(file)) << std::string(3072, 'x');
  }
  cifar::Options options{.data = folder.path().string(), .split = cifar::Split::holdout};
  options.batch_size = 4;
  const auto data = cifar::load_data(options);
  CHECK(torch::equal(data.train.labels, torch::arange(4)));
  CHECK(torch::equal(data.validation.labels, torch::tensor({4}, torch::kInt64)));
  options.split = cifar::Split::reference;
  const auto reference = cifar::load_data(options);
  CHECK(reference.train.size() == 4);
  CHECK(torch::equal(reference.validation.labels, torch::tensor({5}, torch::kInt64)));
  options.train_size = 5;
  CHECK_THROWS_WITH(cifar::load_data(options), Catch::Matchers::Contains("--train-size is 5, but there are 4"));
}

TEST_CASE("sizes beyond the data are refused") {
  CHECK_THROWS_AS(cifar::load_data({.train_size = 100, .test_size = 10, .batch_size = 101}), cifar::UsageError);
  const auto data = cifar::load_data({.train_size = 100, .test_size = 10, .image_size = 16, .batch_size = 100});
  CHECK(data.train.pixels.sizes() == torch::IntArrayRef{100, 3, 16, 16});
  CHECK(data.test.size() == 10);
}
