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

microreg::Estimator estimator_called(const std::string& name) {
  using microreg::Gates;
  if (name == "exact") {
    return microreg::Exact{};
  }
  const Gates gates = name.ends_with("-frozen") ? Gates::frozen : Gates::free;
  if (name.starts_with("forward-")) {
    return microreg::ForwardDifference{.gates = gates};
  }
  if (name.starts_with("central-")) {
    return microreg::CentralDifference{.gates = gates};
  }
  throw std::invalid_argument("no estimator is called " + name);
}

microreg::RegularizerOptions options_of(const Case& which) {
  microreg::RegularizerOptions options{.strength = 1.0, .micro_batch_size = which.micro_batch};
  options.fused = which.fused;
  options.estimator = estimator_called(which.estimator);
  options.micro_batch_share = which.micro_batch_share;
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
