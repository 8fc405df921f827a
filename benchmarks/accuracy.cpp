#include "accuracy.hpp"

namespace overhead {

namespace {

/// All gradients in one vector, in double precision on the CPU.
torch::Tensor gradient_of(const Workload& workload) {
  std::vector<torch::Tensor> parts;
  for (const auto& parameter : workload.model->parameters()) {
    const torch::Tensor gradient = parameter.grad().defined() ? parameter.grad() : torch::zeros_like(parameter);
    parts.push_back(gradient.detach().to(torch::kCPU, torch::kDouble).flatten());
  }
  return torch::cat(parts);
}

}  // namespace

Accuracy::Accuracy(const Workload& workload, const PenalisedStep& reference) : workload_(workload) {
  plain_step(workload_);
  loss_gradient_ = gradient_of(workload_);
  reference_ = penalty_part(reference);
}

torch::Tensor Accuracy::penalty_part(const PenalisedStep& step) const {
  torch::manual_seed(2);
  step();
  return gradient_of(workload_) - loss_gradient_;
}

double Accuracy::relative_error(const PenalisedStep& step) const {
  return ((penalty_part(step) - reference_).norm() / reference_.norm()).item<double>();
}

}  // namespace overhead
