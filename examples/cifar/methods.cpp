#include "methods.hpp"

#include <microreg/microreg.hpp>

namespace cifar {

namespace {

template <class Penalty>
Step step_with(Penalty penalty, std::shared_ptr<ImageClassifier> model,
               std::shared_ptr<torch::optim::Optimizer> optimizer, microreg::RegularizerOptions options) {
  return [optimizer = std::move(optimizer),
          regularizer = microreg::Regularizer(std::move(model), torch::nn::CrossEntropyLoss(), std::move(penalty),
                                              std::move(options))](const torch::Tensor& images,
                                                                   const torch::Tensor& labels) mutable {
    optimizer->zero_grad();
    microreg::Report report = regularizer.backward(images, labels);
    optimizer->step();
    return report;
  };
}

}  // namespace

Step make_step(Method method, std::shared_ptr<ImageClassifier> model,
               std::shared_ptr<torch::optim::Optimizer> optimizer, microreg::RegularizerOptions options) {
  switch (method) {
    case Method::sgd:
    case Method::large_batch:
    case Method::gradient_norm:
      return step_with(microreg::GradientNorm{}, std::move(model), std::move(optimizer), std::move(options));
    case Method::fisher_trace:
      return step_with(microreg::FisherTrace{}, std::move(model), std::move(optimizer), std::move(options));
    case Method::average_jacobian:
      return step_with(microreg::AverageJacobian{}, std::move(model), std::move(optimizer), std::move(options));
    case Method::unit_jacobian:
      return step_with(microreg::UnitJacobian{}, std::move(model), std::move(optimizer), std::move(options));
  }
  throw UsageError("--method is not one that this trainer has");
}

}  // namespace cifar
