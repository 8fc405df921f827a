#include "penalised_step.hpp"

#include <microreg/microreg.hpp>

#if defined(MICROREG_WITH_CUDA)
#include <microreg/cuda_graph.hpp>
#endif

#include <memory>
#include <stdexcept>
#include <utility>

namespace overhead {

namespace {

microreg::AnyPenalty<> penalty_called(const std::string& name) {
  if (name == "gradient_norm") {
    return microreg::GradientNorm{};
  }
  if (name == "fisher_trace") {
    return microreg::FisherTrace{};
  }
  if (name == "average_jacobian") {
    return microreg::AverageJacobian{};
  }
  if (name == "unit_jacobian") {
    return microreg::UnitJacobian{};
  }
  throw std::invalid_argument("no penalty is called " + name);
}

microreg::Estimator estimator_called(const std::string& name) {
  using microreg::Gates;
  if (name.starts_with("exact") || name == "plain-graph") {
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
  microreg::RegularizerOptions options{.strength = which.estimator == "plain-graph" ? 0.0 : 1.0,
                                       .micro_batch_size = which.micro_batch};
  options.fused = which.fused;
  options.estimator = estimator_called(which.estimator);
  options.sampling.share = which.micro_batch_share;
  options.workers = which.workers;
  if (which.estimator.ends_with("-graph")) {
#if defined(MICROREG_WITH_CUDA)
    options.cuda_graph = std::make_shared<microreg::CudaGraph>();
#else
    throw std::invalid_argument(which.estimator + " needs a build against a LibTorch for CUDA");
#endif
  }
  return options;
}

}  // namespace

PenalisedStep make_penalised_step(const Workload& workload, const Case& which) {
  microreg::RegularizerOptions options = options_of(which);
  options.autocast = workload.autocast;
  microreg::Regularizer regularizer(workload.model, torch::nn::CrossEntropyLoss(), penalty_called(which.penalty),
                                    std::move(options));
  return [workload, regularizer]() mutable {
    workload.model->zero_grad();
    return regularizer.backward(workload.images, workload.labels);
  };
}

}  // namespace overhead
