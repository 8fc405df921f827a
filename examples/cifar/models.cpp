#include "models.hpp"

namespace cifar {

std::shared_ptr<ImageClassifier> make_model(Architecture architecture, const ModelOptions& options) {
  switch (architecture) {
    case Architecture::cnn:
      return make_cnn(options);
    case Architecture::resnet18:
      return make_resnet18(options);
  }
  throw UsageError("--model is not a network that this trainer has");
}

}  // namespace cifar
