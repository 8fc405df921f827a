#include "evaluation.hpp"

#include <microreg/distributed/report.hpp>
#include <microreg/distributed/shard.hpp>
#include <microreg/microreg.hpp>

#include <algorithm>

namespace cifar {

double accuracy(ImageClassifier& model, const Images& images, const Normalization& normalization, Layout layout,
                microreg::Communicator* ranks) {
  const torch::NoGradGuard no_grad;
  const bool was_training = model.is_training();
  model.eval();
  torch::Tensor correct = torch::zeros({}, images.labels.options());
  const std::int64_t chunk = 500;
  const auto mine = ranks == nullptr ? microreg::Shard{0, images.size()} : microreg::shard(images.size(), 1, *ranks);
  const std::int64_t end = mine.begin + mine.size;
  for (std::int64_t begin = mine.begin; begin < end; begin += chunk) {
    const std::int64_t length = std::min(chunk, end - begin);
    const torch::Tensor logits =
        model.forward(network_input(images.pixels.narrow(0, begin, length), normalization, layout));
    correct += logits.argmax(1).eq(images.labels.narrow(0, begin, length)).sum();
  }
  model.train(was_training);
  correct = correct.to(torch::kCPU).reshape({1});
  if (ranks != nullptr) {
    ranks->all_reduce(correct)();
  }
  return correct.item<double>() / static_cast<double>(images.size());
}

std::vector<double> measured_penalties(const std::shared_ptr<ImageClassifier>& model, const Images& images,
                                       const Normalization& normalization, std::int64_t micro_batch_size,
                                       std::int64_t workers, const std::vector<Monitor>& monitors, Layout layout,
                                       const std::shared_ptr<microreg::Communicator>& ranks) {
  const auto [begin, size] =
      ranks == nullptr ? microreg::Shard{0, images.size()} : microreg::shard(images.size(), micro_batch_size, *ranks);
  const torch::Tensor input = network_input(images.pixels.narrow(0, begin, size), normalization, layout);
  const torch::Tensor labels = images.labels.narrow(0, begin, size);
  const auto measured = [&](microreg::AnyPenalty<> penalty) {
    const auto report =
        microreg::measure(model, torch::nn::CrossEntropyLoss(), std::move(penalty), input, labels,
                          {.micro_batch_size = micro_batch_size, .workers = workers, .communicator = ranks});
    return (ranks == nullptr ? report : microreg::reduced(report, *ranks)).penalties.front().value.item<double>();
  };
  std::vector<double> values{measured(microreg::GradientNorm{})};
  for (const Monitor monitor : monitors) {
    switch (monitor) {
      case Monitor::fisher_trace:
        values.push_back(measured(microreg::FisherTrace{}));
        break;
      case Monitor::average_jacobian:
        values.push_back(measured(microreg::AverageJacobian{}));
        break;
      case Monitor::unit_jacobian:
        values.push_back(measured(microreg::UnitJacobian{}));
        break;
    }
  }
  return values;
}

}  // namespace cifar
