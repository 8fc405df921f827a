#include "models.hpp"

namespace cifar {

std::shared_ptr<ImageClassifier> make_model(Architecture architecture, const ModelOptions& options) {
  switch (architecture) {
    case Architecture::cnn:
      return make_cnn(options);
    case Architecture::resnet18:
      return make_resnet18(options);
    case Architecture::vgg11:
      return make_vgg11(options);
    case Architecture::vgg16_bn:
      return make_vgg16_bn(options);
  }
  throw UsageError("--model is not a network that this trainer has");
}

}  // namespace cifar
