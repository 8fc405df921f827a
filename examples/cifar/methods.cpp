#include "methods.hpp"

#include <microreg/distributed/report.hpp>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "random_streams.hpp"

namespace cifar {

namespace {

microreg::Estimator estimator_of(EstimatorName name) {
  using microreg::Gates;
  switch (name) {
    case EstimatorName::exact:
      return microreg::Exact{};
    case EstimatorName::forward_frozen:
      return microreg::ForwardDifference{.gates = Gates::frozen};
    case EstimatorName::forward_free:
      return microreg::ForwardDifference{.gates = Gates::free};
    case EstimatorName::central_frozen:
      return microreg::CentralDifference{.gates = Gates::frozen};
    case EstimatorName::central_free:
      return microreg::CentralDifference{.gates = Gates::free};
  }
  throw UsageError("--estimator is not one that this trainer has");
}

microreg::RegularizerOptions regularizer_options(const Options& options,
                                                 const std::shared_ptr<microreg::Communicator>& ranks) {
  return {.strength = microreg::LinearWarmUp{.peak = options.strength, .steps = options.warm_up},
          .micro_batch_size = options.micro_batch_size,
          .estimator = estimator_of(options.estimator),
          .sampling = {.share = options.micro_batch_share,
                       .every = options.every,
                       .seed = stream_seed(options.seed, Stream::penalty)},
          .weighting = options.weighting == WeightingName::samples ? microreg::Weighting::samples
                                                                   : microreg::Weighting::reference,
          .check_finite = microreg::CheckFinite::always,
          .workers = std::max<std::int64_t>(options.workers, 0),  // unresolved: micro-batches in order
          .communicator = ranks};
}

void set_learning_rate(torch::optim::Optimizer& optimizer, double learning_rate) {
  for (auto& group : optimizer.param_groups()) {
    group.options().set_lr(learning_rate);
  }
}

microreg::AnyPenalty<> penalty_of(Method method) {
  switch (method) {
    case Method::fisher_trace:
      return microreg::FisherTrace{};
    case Method::average_jacobian:
      return microreg::AverageJacobian{};
    case Method::unit_jacobian:
      return microreg::UnitJacobian{};
    case Method::sgd:
    case Method::large_batch:
    case Method::gradient_norm:
    case Method::iterative_grafting:
    case Method::external_grafting:
    case Method::normalized:
      return microreg::GradientNorm{};
  }
  throw UsageError("--method is not one that this trainer has");
}

}  // namespace

Step::Step(const Options& options, const std::shared_ptr<ImageClassifier>& model,
           std::shared_ptr<torch::optim::SGD> optimizer, std::shared_ptr<microreg::Communicator> ranks)
    : options_(options),
      model_(model),
      optimizer_(std::move(optimizer)),
      ranks_(std::move(ranks)),
      regularizer_(model, torch::nn::CrossEntropyLoss(), penalty_of(options.method),
                   regularizer_options(options, ranks_)) {
  if (options.method == Method::external_grafting) {
    norms_.emplace(options.norms_from);
  }
}

microreg::Report Step::operator()(std::int64_t step, const torch::Tensor& images, const torch::Tensor& labels) {
  set_learning_rate(*optimizer_, learning_rate_at(options_, step));
  optimizer_->zero_grad();
  regularizer_.set_step(step);
  microreg::Report report = regularizer_.backward(images, labels);
  graft(step, report);
  optimizer_->step();
  return report;
}

void Step::graft(std::int64_t step, const microreg::Report& report) const {
  if (options_.method == Method::iterative_grafting) {
    // The batch is in random order, so its first micro-batch is a random one.
    const microreg::Report whole = ranks_ == nullptr ? report : microreg::reduced(report, *ranks_);
    microreg::graft(model_->parameters(), whole.penalties.front().micro_batch_norms[0]);
  } else if (options_.method == Method::external_grafting) {
    microreg::graft(model_->parameters(), norms_->at(step));
  } else if (options_.method == Method::normalized) {
    microreg::graft(model_->parameters(), 1.0);
  }
}

}  // namespace cifar
