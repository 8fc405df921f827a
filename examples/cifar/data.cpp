#include "data.hpp"

#include <fmt/format.h>

#include "binary_files.hpp"
#include "synthetic.hpp"

namespace cifar {

namespace {

constexpr std::int64_t synthetic_size = 2000;
constexpr std::int64_t full_image_size = 32;

std::int64_t or_default(std::int64_t size) { return size == 0 ? synthetic_size : size; }

void check_available(std::string_view option, std::int64_t asked, std::int64_t available) {
  if (asked > available) {
    throw UsageError(fmt::format("{} is {}, but there are {} such images; lower it, or leave it out for all of them",
                                 option, asked, available));
  }
}

/// A view.
Images part(const Images& images, std::int64_t begin, std::int64_t count) {
  return {images.pixels.narrow(0, begin, count), images.labels.narrow(0, begin, count)};
}

}  // namespace

Images first(const Images& images, std::int64_t count) {
  // Cloned, so that the whole set can be freed.
  return count == 0 || count == images.size()
             ? images
             : Images{images.pixels.narrow(0, 0, count).clone(), images.labels.narrow(0, 0, count).clone()};
}

torch::Tensor pool(const torch::Tensor& pixels, std::int64_t factor) {
  const std::int64_t chunk = 4096;  // Bounds the memory of the floats.
  std::vector<torch::Tensor> parts;
  for (const torch::Tensor& part : pixels.split(chunk)) {
    parts.push_back(torch::avg_pool2d(part.to(torch::kFloat), factor).round_().to(torch::kUInt8));
  }
  return torch::cat(parts);
}

torch::Tensor normalized(const torch::Tensor& pixels, const Normalization& normalization) {
  std::vector<torch::Tensor> channels = pixels.to(torch::kFloat).unbind(1);
  for (std::size_t c = 0; c < channels.size(); ++c) {
    const double scale = 1 / (255 * normalization.deviation[c]);
    channels[c] = channels[c].mul(scale).sub_(normalization.mean[c] / normalization.deviation[c]);
  }
  return torch::stack(channels, 1);
}

torch::Tensor network_input(const torch::Tensor& pixels, const Normalization& normalization, Layout layout) {
  return normalized(pixels, normalization)
      .contiguous(layout == Layout::channels_last ? torch::MemoryFormat::ChannelsLast
                                                  : torch::MemoryFormat::Contiguous);
}

Data load_data(const Options& options) {
  const bool holdout = options.split == Split::holdout;
  Data data;
  std::int64_t held_out = 0;
  if (options.data == "synthetic") {
    held_out = holdout ? or_default(options.validation_size) : 0;
    data = synthetic_data(or_default(options.train_size) + held_out, or_default(options.test_size), options.seed);
  } else {
    data = read_binary_files(options.data, options.dataset);
    held_out = data.train.size() / 5;  // 10,000 of the official 50,000, which are in random order
  }
  data.validation = part(data.train, data.train.size() - held_out, held_out);
  data.train = part(data.train, 0, data.train.size() - held_out);
  check_available("--train-size", options.train_size, data.train.size());
  if (holdout) {
    check_available("--validation-size", options.validation_size, data.validation.size());
  }
  check_available("--test-size", options.test_size, data.test.size());
  data.train = first(data.train, options.train_size);
  data.test = first(data.test, options.test_size);
  data.validation = holdout ? first(data.validation, options.validation_size) : data.test;
  if (options.image_size != full_image_size) {
    for (Images* images : {&data.train, &data.validation, &data.test}) {
      images->pixels = pool(images->pixels, full_image_size / options.image_size);
    }
  }
  check_available("--batch-size", options.batch_size, data.train.size());
  return data;
}

}  // namespace cifar
