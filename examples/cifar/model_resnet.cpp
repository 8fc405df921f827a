#include "models.hpp"

namespace cifar {

namespace {

torch::nn::Conv2d convolution(std::int64_t in, std::int64_t out, std::int64_t kernel, std::int64_t stride) {
  return torch::nn::Conv2d(torch::nn::Conv2dOptions(in, out, kernel).stride(stride).padding(kernel / 2).bias(false));
}

class BasicBlock : public torch::nn::Module {
 public:
  BasicBlock(std::int64_t in, std::int64_t out, std::int64_t stride) {
    convolution1_ = register_module("convolution1", convolution(in, out, 3, stride));
    norm1_ = register_module("norm1", torch::nn::BatchNorm2d(out));
    convolution2_ = register_module("convolution2", convolution(out, out, 3, 1));
    norm2_ = register_module("norm2", torch::nn::BatchNorm2d(out));
    if (stride != 1 || in != out) {
      shortcut_ = register_module("shortcut",
                                  torch::nn::Sequential(convolution(in, out, 1, stride), torch::nn::BatchNorm2d(out)));
    }
  }

  torch::Tensor forward(const torch::Tensor& x) {
    const torch::Tensor inner = torch::relu(norm1_(convolution1_(x)));
    return torch::relu(norm2_(convolution2_(inner)) + (shortcut_.is_empty() ? x : shortcut_->forward(x)));
  }

 private:
  torch::nn::Conv2d convolution1_{nullptr};
  torch::nn::Conv2d convolution2_{nullptr};
  torch::nn::BatchNorm2d norm1_{nullptr};
  torch::nn::BatchNorm2d norm2_{nullptr};
  torch::nn::Sequential shortcut_{nullptr};
};

class ResNet18 : public ImageClassifier {
 public:
  explicit ResNet18(const ModelOptions& options) {
    const std::int64_t width = options.width > 0 ? options.width : 64;
    stem_ = register_module("stem", convolution(3, width, 3, 1));
    stem_norm_ = register_module("stem_norm", torch::nn::BatchNorm2d(width));
    std::int64_t in = width;
    for (std::int64_t stage = 0; stage < 4; ++stage) {
      const std::int64_t out = width << stage;
      stages_->push_back(BasicBlock(in, out, stage == 0 ? 1 : 2));
      stages_->push_back(BasicBlock(out, out, 1));
      in = out;
    }
    register_module("stages", stages_);
    classifier_ = register_module("classifier", torch::nn::Linear(in, options.classes));
  }

  torch::Tensor forward(torch::Tensor images) override {
    const torch::Tensor features = stages_->forward(torch::relu(stem_norm_(stem_(images))));
    return classifier_(features.mean({2, 3}));
  }

 private:
  torch::nn::Conv2d stem_{nullptr};
  torch::nn::BatchNorm2d stem_norm_{nullptr};
  torch::nn::Sequential stages_;
  torch::nn::Linear classifier_{nullptr};
};

}  // namespace

std::shared_ptr<ImageClassifier> make_resnet18(const ModelOptions& options) {
  return std::make_shared<ResNet18>(options);
}

}  // namespace cifar
