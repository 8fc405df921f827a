#include "networks.hpp"

#include <cstddef>
#include <utility>
#include <vector>

namespace overhead {

namespace {

/// Linear layers with ReLU between, of the first widths[0] numbers of a picture.
class Perceptron final : public cifar::ImageClassifier {
 public:
  explicit Perceptron(std::vector<std::int64_t> widths) : inputs_(widths.front()) {
    for (std::size_t i = 0; i + 1 < widths.size(); ++i) {
      layers_->push_back(torch::nn::Linear(widths[i], widths[i + 1]));
      if (i + 2 < widths.size()) {
        layers_->push_back(torch::nn::ReLU());
      }
    }
    register_module("layers", layers_);
  }

  torch::Tensor forward(torch::Tensor images) override {
    return layers_->forward(images.flatten(1).narrow(1, 0, inputs_));
  }

 private:
  std::int64_t inputs_;
  torch::nn::Sequential layers_;
};

}  // namespace

std::shared_ptr<cifar::ImageClassifier> make_mlp() {
  return std::make_shared<Perceptron>(std::vector<std::int64_t>{784, 2048, 2048, 10});
}

std::shared_ptr<cifar::ImageClassifier> make_small_mlp() {
  return std::make_shared<Perceptron>(std::vector<std::int64_t>{16, 32, 10});
}

}  // namespace overhead
