#include "models.hpp"

#include "catch.hpp"

namespace {

std::int64_t parameter_count(const torch::nn::Module& module) {
  std::int64_t count = 0;
  for (const auto& parameter : module.parameters()) {
    count += parameter.numel();
  }
  return count;
}

}  // namespace

TEST_CASE("parameter counts are those of the layer lists") {
  // 3x3 convolutions with bias, then a linear layer on 64 planes of (S / 4)^2.
  const std::int64_t convolutions = (27 * 16 + 16) + (144 * 32 + 32) + (288 * 64 + 64);
  CHECK(parameter_count(*cifar::make_cnn({.classes = 10, .image_size = 32})) == convolutions + 64 * 64 * 10 + 10);
  CHECK(parameter_count(*cifar::make_cnn({.classes = 100, .image_size = 16})) == convolutions + 64 * 16 * 100 + 100);
  // The well-known count of ResNet-18 for CIFAR.
  CHECK(parameter_count(*cifar::make_resnet18({.classes = 10})) == 11173962);
  CHECK(parameter_count(*cifar::make_resnet18({.classes = 100})) == 11173962 + 90 * 513);
}

TEST_CASE("parameter counts of the VGG networks are those of their layer lists") {
  // Output channels of the 3x3 convolutions (arXiv:1409.1556, table 1, columns A and D), each with bias, then three
  // linear layers. The last stage's 2x2 maps are pooled to one pixel, so the classifier starts with 512 features; at
  // half the size they are at one pixel before.
  const auto convolutions = [](std::initializer_list<std::int64_t> channels) {
    std::int64_t count = 0;
    std::int64_t in = 3;
    for (const std::int64_t out : channels) {
      count += 9 * in * out + out;
      in = out;
    }
    return count;
  };
  const auto classifier = [](std::int64_t classes) { return 2 * (512 * 512 + 512) + 512 * classes + classes; };
  const std::int64_t a = convolutions({64, 128, 256, 256, 512, 512, 512, 512});
  const std::int64_t d = convolutions({64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512});
  const std::int64_t norms = 2 * (2 * 64 + 2 * 128 + 3 * 256 + 6 * 512);
  CHECK(parameter_count(*cifar::make_vgg11({.classes = 10})) == a + classifier(10));
  CHECK(parameter_count(*cifar::make_vgg11({.classes = 100, .image_size = 16})) == a + classifier(100));
  CHECK(parameter_count(*cifar::make_vgg16_bn({.classes = 10})) == d + norms + classifier(10));
}

TEST_CASE("every network gives one logit a class, at both image sizes") {
  const auto architecture = GENERATE(cifar::Architecture::cnn, cifar::Architecture::resnet18,
                                     cifar::Architecture::vgg11, cifar::Architecture::vgg16_bn);
  const std::int64_t side = GENERATE(16, 32);
  const auto model = cifar::make_model(architecture, {.classes = 7, .image_size = side, .width = 4});
  const auto logits = model->forward(torch::randn({2, 3, side, side}));
  CHECK(logits.sizes() == torch::IntArrayRef{2, 7});
  logits.sum().backward();
  for (const auto& parameter : model->named_parameters()) {
    INFO(parameter.key());
    CHECK(parameter->grad().defined());
  }
}
