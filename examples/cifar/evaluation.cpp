#include "evaluation.hpp"

#include <microreg/microreg.hpp>

#include <algorithm>

namespace cifar {

double accuracy(ImageClassifier& model, const Images& images, const Normalization& normalization) {
  const torch::NoGradGuard no_grad;
  const bool was_training = model.is_training();
  model.eval();
  torch::Tensor correct = torch::zeros({}, images.labels.options());
  const std::int64_t chunk = 500;
  for (std::int64_t begin = 0; begin < images.size(); begin += chunk) {
    const std::int64_t length = std::min(chunk, images.size() - begin);
    const torch::Tensor logits = model.forward(normalized(images.pixels.narrow(0, begin, length), normalization));
    correct += logits.argmax(1).eq(images.labels.narrow(0, begin, length)).sum();
  }
  model.train(was_training);
  return correct.item<double>() / static_cast<double>(images.size());
}

double micro_batch_gradient_norm(const std::shared_ptr<ImageClassifier>& model, const Images& images,
                                 const Normalization& normalization, std::int64_t micro_batch_size) {
  const microreg::Report report = microreg::measure(
      model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{}, normalized(images.pixels, normalization),
      images.labels, {.micro_batch_size = micro_batch_size, .check_finite = microreg::CheckFinite::never});
  return report.penalties.front().value.item<double>();
}

}  // namespace cifar
