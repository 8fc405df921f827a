#include "models.hpp"

#include <vector>

namespace cifar {

namespace {

/// Convolutions of one stage in multiples of the first stage's channels; max pooling ends a stage.
using Stages = std::vector<std::vector<std::int64_t>>;

const Stages vgg11_stages{{1}, {2}, {4, 4}, {8, 8}, {8, 8}};
const Stages vgg16_stages{{1, 1}, {2, 2}, {4, 4, 4}, {8, 8, 8}, {8, 8, 8}};

class Vgg : public ImageClassifier {
 public:
  Vgg(const ModelOptions& options, const Stages& stages, bool batch_norm) {
    const std::int64_t width = options.width > 0 ? options.width : 64;
    std::int64_t channels = 3;
    std::int64_t side = options.image_size;
    torch::nn::Sequential features;
    for (const auto& stage : stages) {
      for (const std::int64_t multiple : stage) {
        features->push_back(convolution(channels, multiple * width));
        channels = multiple * width;
        if (batch_norm) {
          features->push_back(torch::nn::BatchNorm2d(channels));
        }
        features->push_back(torch::nn::ReLU());
      }
      if (side > 1) {  // images of 16x16 are down to one pixel before the last stage
        features->push_back(torch::nn::MaxPool2d(2));
        side /= 2;
      }
    }
    features_ = register_module("features", features);
    classifier_ = register_module(
        "classifier", torch::nn::Sequential(torch::nn::Flatten(), torch::nn::Linear(channels * side * side, channels),
                                            torch::nn::ReLU(), torch::nn::Linear(channels, channels), torch::nn::ReLU(),
                                            torch::nn::Linear(channels, options.classes)));
  }

  torch::Tensor forward(torch::Tensor images) override {
    return classifier_->forward(features_->forward(std::move(images)));
  }

 private:
  /// Weights after He et al. (arXiv:1502.01852): with LibTorch's own, the signal fades over so many layers without
  /// normalisation.
  static torch::nn::Conv2d convolution(std::int64_t in, std::int64_t out) {
    torch::nn::Conv2d layer(torch::nn::Conv2dOptions(in, out, 3).padding(1));
    torch::nn::init::kaiming_normal_(layer->weight, 0, torch::kFanOut, torch::kReLU);
    torch::nn::init::zeros_(layer->bias);
    return layer;
  }

  torch::nn::Sequential features_{nullptr};
  torch::nn::Sequential classifier_{nullptr};
};

}  // namespace

std::shared_ptr<ImageClassifier> make_vgg11(const ModelOptions& options) {
  return std::make_shared<Vgg>(options, vgg11_stages, /*batch_norm=*/false);
}

std::shared_ptr<ImageClassifier> make_vgg16_bn(const ModelOptions& options) {
  return std::make_shared<Vgg>(options, vgg16_stages, /*batch_norm=*/true);
}

}  // namespace cifar
