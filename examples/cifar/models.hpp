/// @file
/// The networks.
#pragma once

#include "options.hpp"

#include <torch/torch.h>

#include <cstdint>
#include <memory>

namespace cifar {

/// Images [N, 3, S, S] in, logits [N, classes] out. One type for all networks, so that what trains them is compiled
/// once.
class ImageClassifier : public torch::nn::Module {
 public:
  virtual torch::Tensor forward(torch::Tensor images) = 0;
};

struct ModelOptions {
  std::int64_t classes = 10;
  std::int64_t image_size = 32;
  std::int64_t width = 0;  ///< channels of the first stage; 0: the network's own default
};

/// Three 3x3 convolutions (16, 32, 64 channels) with ReLU, max pooling after the first two, a linear layer. No
/// normalisation: gradients of a micro-batch depend on its samples one by one.
[[nodiscard]] std::shared_ptr<ImageClassifier> make_cnn(const ModelOptions& options);

/// ResNet-18 for 32x32 images: a 3x3 stem without pooling, four stages of two basic blocks (64 to 512 channels),
/// BatchNorm, global average pooling (He et al., arXiv:1512.03385).
[[nodiscard]] std::shared_ptr<ImageClassifier> make_resnet18(const ModelOptions& options);

/// VGG-11 (Simonyan and Zisserman, arXiv:1409.1556, configuration A) for 32x32 images: eight 3x3 convolutions with bias
/// in five stages (64 to 512 channels), no BatchNorm, no dropout, a classifier of three linear layers, 512-512-classes.
[[nodiscard]] std::shared_ptr<ImageClassifier> make_vgg11(const ModelOptions& options);

/// VGG-16 (configuration D, thirteen convolutions) with BatchNorm after each convolution, the same classifier.
[[nodiscard]] std::shared_ptr<ImageClassifier> make_vgg16_bn(const ModelOptions& options);

/// The network called `architecture`, its weights drawn from LibTorch's default generator.
[[nodiscard]] std::shared_ptr<ImageClassifier> make_model(Architecture architecture, const ModelOptions& options);

}  // namespace cifar
