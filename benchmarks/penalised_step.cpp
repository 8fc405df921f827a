#include "penalised_step.hpp"

#include <microreg/microreg.hpp>

#include <memory>
#include <stdexcept>

namespace overhead {

namespace {

template <class Penalty>
PenalisedStep step_with(const Workload& workload, Penalty penalty, const microreg::RegularizerOptions& options) {
  microreg::Regularizer regularizer(workload.model, torch::nn::CrossEntropyLoss(), std::move(penalty), options);
  auto shared = std::make_shared<decltype(regularizer)>(std::move(regularizer));
  return [workload, shared] {
    workload.model->zero_grad();
    return shared->backward(workload.images, workload.labels);
  };
}

microreg::RegularizerOptions options_of(const Case& which) {
  microreg::RegularizerOptions options{.strength = 1.0, .micro_batch_size = which.micro_batch};
  if (which.estimator != "exact") {
    throw std::invalid_argument("no estimator is called " + which.estimator);
  }
  options.fused = which.fused;
  return options;
}

}  // namespace

PenalisedStep make_penalised_step(const Workload& workload, const Case& which) {
  const auto options = options_of(which);
  if (which.penalty == "gradient_norm") {
    return step_with(workload, microreg::GradientNorm{}, options);
  }
  if (which.penalty == "fisher_trace") {
    return step_with(workload, microreg::FisherTrace{}, options);
  }
  if (which.penalty == "average_jacobian") {
    return step_with(workload, microreg::AverageJacobian{}, options);
  }
  if (which.penalty == "unit_jacobian") {
    return step_with(workload, microreg::UnitJacobian{}, options);
  }
  throw std::invalid_argument("no penalty is called " + which.penalty);
}

}  // namespace overhead
