#include "evaluation.hpp"

#include <microreg/microreg.hpp>

#include <algorithm>

namespace cifar {

double accuracy(ImageClassifier& model, const Images& images, const Normalization& normalization, Layout layout) {
  const torch::NoGradGuard no_grad;
  const bool was_training = model.is_training();
  model.eval();
  torch::Tensor correct = torch::zeros({}, images.labels.options());
  const std::int64_t chunk = 500;
  for (std::int64_t begin = 0; begin < images.size(); begin += chunk) {
    const std::int64_t length = std::min(chunk, images.size() - begin);
    const torch::Tensor logits =
        model.forward(network_input(images.pixels.narrow(0, begin, length), normalization, layout));
    correct += logits.argmax(1).eq(images.labels.narrow(0, begin, length)).sum();
  }
  model.train(was_training);
  return correct.item<double>() / static_cast<double>(images.size());
}

std::vector<double> measured_penalties(const std::shared_ptr<ImageClassifier>& model, const Images& images,
                                       const Normalization& normalization, std::int64_t micro_batch_size,
                                       std::int64_t workers, const std::vector<Monitor>& monitors, Layout layout) {
  const torch::Tensor input = network_input(images.pixels, normalization, layout);
  const auto measured = [&](microreg::AnyPenalty<> penalty) {
    return microreg::measure(model, torch::nn::CrossEntropyLoss(), std::move(penalty), input, images.labels,
                             {.micro_batch_size = micro_batch_size, .workers = workers})
        .penalties.front()
        .value.item<double>();
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
