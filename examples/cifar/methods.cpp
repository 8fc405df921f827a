#include "methods.hpp"

#include <microreg/grafting.hpp>
#include <microreg/microreg.hpp>

#include <utility>

#include "random_streams.hpp"
#include "recorded_norms.hpp"

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

microreg::RegularizerOptions regularizer_options(const Options& options) {
  return {.strength = microreg::LinearWarmUp{.peak = options.strength, .steps = options.warm_up},
          .micro_batch_size = options.micro_batch_size,
          .estimator = estimator_of(options.estimator),
          .micro_batch_share = options.micro_batch_share,
          .every = options.every,
          .seed = stream_seed(options.seed, Stream::penalty),
          .weighting = options.weighting == WeightingName::samples ? microreg::Weighting::samples
                                                                   : microreg::Weighting::reference,
          .check_finite = microreg::CheckFinite::always};
}

void set_learning_rate(torch::optim::Optimizer& optimizer, double learning_rate) {
  for (auto& group : optimizer.param_groups()) {
    group.options().set_lr(learning_rate);
  }
}

/// `before_update(step, report)` may change the gradients.
template <class Penalty, class BeforeUpdate>
Step step_with(Penalty penalty, const Options& options, const std::shared_ptr<ImageClassifier>& model,
               const std::shared_ptr<torch::optim::SGD>& optimizer, BeforeUpdate before_update) {
  return [options, optimizer, before_update = std::move(before_update),
          regularizer = microreg::Regularizer(model, torch::nn::CrossEntropyLoss(), std::move(penalty),
                                              regularizer_options(options))](
             std::int64_t step, const torch::Tensor& images, const torch::Tensor& labels) mutable {
    set_learning_rate(*optimizer, learning_rate_at(options, step));
    optimizer->zero_grad();
    regularizer.set_step(step);
    microreg::Report report = regularizer.backward(images, labels);
    before_update(step, report);
    optimizer->step();
    return report;
  };
}

}  // namespace

Step make_step(const Options& options, const std::shared_ptr<ImageClassifier>& model,
               const std::shared_ptr<torch::optim::SGD>& optimizer) {
  const auto with = [&](auto penalty) {
    return step_with(std::move(penalty), options, model, optimizer, [](std::int64_t, const microreg::Report&) {});
  };
  const auto grafted = [&](auto norm) {
    return step_with(
        microreg::GradientNorm{}, options, model, optimizer,
        [parameters = model->parameters(), norm = std::move(norm)](std::int64_t step, const microreg::Report& report) {
          microreg::graft(parameters, norm(step, report));
        });
  };
  switch (options.method) {
    case Method::sgd:
    case Method::large_batch:
    case Method::gradient_norm:
      return with(microreg::GradientNorm{});
    case Method::fisher_trace:
      return with(microreg::FisherTrace{});
    case Method::average_jacobian:
      return with(microreg::AverageJacobian{});
    case Method::unit_jacobian:
      return with(microreg::UnitJacobian{});
    case Method::iterative_grafting:  // The batch is in random order, so its first micro-batch is a random one.
      return grafted(
          [](std::int64_t, const microreg::Report& report) { return report.penalties.front().micro_batch_norms[0]; });
    case Method::external_grafting:
      return grafted([norms = RecordedNorms(options.norms_from)](std::int64_t step, const microreg::Report&) {
        return norms.at(step);
      });
    case Method::normalized:
      return grafted([](std::int64_t, const microreg::Report&) { return 1.0; });
  }
  throw UsageError("--method is not one that this trainer has");
}

}  // namespace cifar
