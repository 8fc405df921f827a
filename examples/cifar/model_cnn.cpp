#include "models.hpp"

namespace cifar {

namespace {

using torch::nn::Conv2dOptions;

class Cnn : public ImageClassifier {
 public:
  explicit Cnn(const ModelOptions& options) {
    const std::int64_t width = options.width > 0 ? options.width : 16;
    const std::int64_t side = options.image_size / 4;
    layers_ = register_module(
        "layers",
        torch::nn::Sequential(torch::nn::Conv2d(Conv2dOptions(3, width, 3).padding(1)), torch::nn::ReLU(),
                              torch::nn::MaxPool2d(2), torch::nn::Conv2d(Conv2dOptions(width, 2 * width, 3).padding(1)),
                              torch::nn::ReLU(), torch::nn::MaxPool2d(2),
                              torch::nn::Conv2d(Conv2dOptions(2 * width, 4 * width, 3).padding(1)), torch::nn::ReLU(),
                              torch::nn::Flatten(), torch::nn::Linear(4 * width * side * side, options.classes)));
  }

  torch::Tensor forward(torch::Tensor images) override { return layers_->forward(std::move(images)); }

 private:
  torch::nn::Sequential layers_{nullptr};
};

}  // namespace

std::shared_ptr<ImageClassifier> make_cnn(const ModelOptions& options) { return std::make_shared<Cnn>(options); }

}  // namespace cifar
