#include "data_order.hpp"

#include "random_streams.hpp"

#include <algorithm>

namespace cifar {

DataOrder::DataOrder(std::int64_t samples, std::int64_t batch_size, std::int64_t seed)
    : samples_(samples), batch_size_(batch_size), seed_(seed) {}

torch::Tensor DataOrder::batch(std::int64_t step) {
  std::vector<torch::Tensor> parts;
  std::int64_t position = step * batch_size_;
  for (std::int64_t missing = batch_size_; missing > 0;) {
    const std::int64_t offset = position % samples_;
    const std::int64_t length = std::min(missing, samples_ - offset);
    parts.push_back(epoch(position / samples_).narrow(0, offset, length));
    position += length;
    missing -= length;
  }
  return torch::cat(parts);
}

const torch::Tensor& DataOrder::epoch(std::int64_t number) {
  if (number != epoch_number_) {
    epoch_order_ =
        torch::randperm(samples_, stream_generator(torch::kCPU, seed_, Stream::order, number), torch::kInt64);
    epoch_number_ = number;
  }
  return epoch_order_;
}

}  // namespace cifar
