/// @file
/// Built into two shared objects, as extension modules are: each has headers of its own. A third has those of another
/// version.
#include "object.hpp"

#include <torch/torch.h>
#include <microreg/gates/scope.hpp>
#include <microreg/microreg.hpp>

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
};

}  // namespace

extern "C" {

EXPORT void* open_scope() { return new microreg::FusedScope; }

EXPORT void close_scope(void* scope) { delete static_cast<microreg::FusedScope*>(scope); }

EXPORT double step() {
  Network network;
  microreg::GradientNorm{}(network.loss(), network.layers->parameters()).backward();
  double sum = 0;
  for (const torch::Tensor& parameter : network.layers->parameters()) {
    sum += parameter.grad().abs().sum().item<double>();
  }
  return sum;
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
