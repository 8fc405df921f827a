/// @file
/// Built into two shared objects, as extension modules are: each has headers of its own. A third has those of another
/// version.
#include "object.hpp"

#include <torch/torch.h>
#include <microreg/gates/scope.hpp>
#include <microreg/microreg.hpp>
#include <microreg/step/own_code.hpp>

#include <string>

#define EXPORT __attribute__((visibility("default")))

namespace {

struct Network {
  torch::nn::Sequential layers{torch::nn::Conv2d(torch::nn::Conv2dOptions(2, 3, 3)),
                               torch::nn::BatchNorm2d(3),
                               torch::nn::GELU(),
                               torch::nn::Flatten(),
                               torch::nn::LayerNorm(torch::nn::LayerNormOptions({48})),
                               torch::nn::Softmax(1)};
  torch::Tensor x, direction;

  Network() {
    // Numbers without a generator, which the threads would share.
    layers->to(torch::kFloat64);
    const auto numbers = [](at::IntArrayRef shape) {
      return torch::arange(torch::zeros(shape).numel(), torch::kFloat64).mul(1.7).sin().view(shape);
    };
    const torch::NoGradGuard guard;
    for (torch::Tensor& parameter : layers->parameters()) {
      parameter.copy_(numbers(parameter.sizes()));
    }
    x = numbers({5, 2, 6, 6});
    direction = numbers({5, 48});
  }

  [[nodiscard]] torch::Tensor loss() { return (layers->forward(x) * direction).sum(); }

  [[nodiscard]] double sum_of_gradients() const {
    double sum = 0;
    for (const torch::Tensor& parameter : layers->parameters()) {
      sum += parameter.grad().abs().sum().item<double>();
    }
    return sum;
  }
};

double step_with(const microreg::RegularizerOptions& options) {
  Network network;
  microreg::Regularizer regularizer(
      network.layers, [](const torch::Tensor& y, const torch::Tensor& t) { return (y * t).sum(1).mean(); },
      microreg::GradientNorm{}, options);
  (void)regularizer.backward(network.x, network.direction);
  return network.sum_of_gradients();
}

}  // namespace

extern "C" {

EXPORT void* open_scope() { return new microreg::FusedScope; }

EXPORT void close_scope(void* scope) { delete static_cast<microreg::FusedScope*>(scope); }

EXPORT double step() {
  Network network;
  microreg::GradientNorm{}(network.loss(), network.layers->parameters()).backward();
  return network.sum_of_gradients();
}

EXPORT double stock_step() { return step_with({.micro_batch_size = 2, .fused = false}); }

EXPORT double difference_step() {
  return step_with({.micro_batch_size = 2,
                    .estimator = microreg::CentralDifference{.displace = microreg::Displace::copies},
                    .workers = 2});
}

EXPORT bool has_own_function(const void* tensor) {
  return microreg::detail::own_code({*static_cast<const torch::Tensor*>(tensor)}, {}).any();
}

EXPORT const char* refusal() {
  static std::string message;
  message.clear();
  try {
    const microreg::FusedScope scope;
  } catch (const microreg::Error& error) {
    message = error.what();
  }
  return message.c_str();
}

EXPORT int gates_seen() {
  microreg::GateTape tape;
  try {
    const microreg::RecordGates record(tape);
    (void)torch::relu(torch::ones({2}, torch::requires_grad()));
  } catch (const microreg::Error&) {
    return -1;
  }
  return static_cast<int>(tape.size());
}

EXPORT int gates_seen_in_step(int workers) {
  torch::nn::Sequential model(torch::nn::Linear(3, 4), torch::nn::ReLU(), torch::nn::Linear(4, 2));
  microreg::Regularizer regularizer(model, torch::nn::MSELoss(), microreg::GradientNorm{},
                                    {.micro_batch_size = 2, .workers = workers});
  microreg::GateTape tape;
  const microreg::RecordGates record(tape);
  (void)regularizer.backward(torch::ones({4, 3}), torch::ones({4, 2}));
  return static_cast<int>(tape.size());
}

EXPORT bool is_fused() {
  const auto w = torch::ones({1, 1, 1, 1}, torch::requires_grad());
  const auto y = torch::conv2d(torch::ones({1, 1, 2, 2}), w).pow(2).sum();
  const auto g = torch::autograd::grad({y}, {w}, {}, true, /*create_graph=*/true)[0];
  return g.grad_fn()->name().find("microreg") != std::string::npos;
}
}
