#include "networks.hpp"

#include <cmath>

namespace overhead {

namespace {

constexpr std::int64_t width = 128;
constexpr std::int64_t heads = 4;
constexpr std::int64_t depth = 4;
constexpr std::int64_t patch = 4;
constexpr std::int64_t tokens = (32 / patch) * (32 / patch);

torch::nn::LayerNorm layer_norm() { return torch::nn::LayerNorm(torch::nn::LayerNormOptions({width})); }

class Block : public torch::nn::Module {
 public:
  Block() {
    norm1_ = register_module("norm1", layer_norm());
    projections_ = register_module("projections", torch::nn::Linear(width, 3 * width));
    output_ = register_module("output", torch::nn::Linear(width, width));
    norm2_ = register_module("norm2", layer_norm());
    expand_ = register_module("expand", torch::nn::Linear(width, 4 * width));
    contract_ = register_module("contract", torch::nn::Linear(4 * width, width));
  }

  torch::Tensor forward(const torch::Tensor& x) {
    const torch::Tensor attended = x + attention(norm1_(x));
    return attended + contract_(torch::gelu(expand_(norm2_(attended))));
  }

 private:
  torch::Tensor attention(const torch::Tensor& x) {
    // [N, T, 3, heads, width / heads] -> three of [N, heads, T, width / heads]
    const auto projected = projections_(x).reshape({x.size(0), x.size(1), 3, heads, width / heads});
    const auto parts = projected.permute({2, 0, 3, 1, 4}).unbind(0);
    const double scale = 1 / std::sqrt(static_cast<double>(width / heads));
    const torch::Tensor weights = torch::matmul(parts[0] * scale, parts[1].transpose(-2, -1)).softmax(-1);
    return output_(torch::matmul(weights, parts[2]).transpose(1, 2).reshape(x.sizes()));
  }

  torch::nn::LayerNorm norm1_{nullptr};
  torch::nn::Linear projections_{nullptr};
  torch::nn::Linear output_{nullptr};
  torch::nn::LayerNorm norm2_{nullptr};
  torch::nn::Linear expand_{nullptr};
  torch::nn::Linear contract_{nullptr};
};

class Vit : public cifar::ImageClassifier {
 public:
  Vit() {
    positions_ = register_parameter("positions", 0.02 * torch::randn({1, tokens, width}));
    embed_ = register_module("embed", torch::nn::Conv2d(torch::nn::Conv2dOptions(3, width, patch).stride(patch)));
    for (std::int64_t i = 0; i < depth; ++i) {
      blocks_->push_back(Block());
    }
    register_module("blocks", blocks_);
    norm_ = register_module("norm", layer_norm());
    classifier_ = register_module("classifier", torch::nn::Linear(width, 10));
  }

  torch::Tensor forward(torch::Tensor images) override {
    const torch::Tensor embedded = embed_(images).flatten(2).transpose(1, 2) + positions_;
    return classifier_(norm_(blocks_->forward(embedded)).mean(1));
  }

 private:
  torch::Tensor positions_;
  torch::nn::Conv2d embed_{nullptr};
  torch::nn::Sequential blocks_;
  torch::nn::LayerNorm norm_{nullptr};
  torch::nn::Linear classifier_{nullptr};
};

}  // namespace

std::shared_ptr<cifar::ImageClassifier> make_vit() { return std::make_shared<Vit>(); }

}  // namespace overhead
