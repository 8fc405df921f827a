// A penalty of one's own: any scalar of the model's output, the probe, becomes a penalty on its gradient's norm.
#include <torch/torch.h>

#include <cmath>
#include <cstdio>
#include <microreg/microreg.hpp>

int main() {
  torch::manual_seed(0);
  torch::nn::Linear model(8, 4);
  const auto images = torch::randn({64, 8});
  const auto labels = torch::randint(4, {64});

  // [custom_probe]
  // How sharply the log-partition function reacts to the weights: large where the logits are far apart.
  microreg::SquaredGradientNorm penalty{[](const torch::Tensor& logits) { return logits.logsumexp(1).mean(); }};

  microreg::Regularizer regularizer(model, torch::nn::CrossEntropyLoss(),
                                    0.01 * microreg::GradientNorm{} + 0.1 * penalty, {.micro_batch_size = 64});
  const auto report = regularizer.backward(images, labels);
  // [end]

  // For a linear layer that gradient is known: the mean over samples of p(x) times x for the weights, of p(x) for the
  // bias, where p is the softmax of the logits.
  const torch::NoGradGuard no_grad;
  const auto p = model(images).softmax(1);
  const double expected =
      (p.t().mm(images) / 64).square().sum().item<double>() + p.mean(0).square().sum().item<double>();
  const double found = report.penalties[1].value.item<double>();
  std::printf("penalty \"%s\": %.6f, by hand %.6f\n", report.penalties[1].name.c_str(), found, expected);
  return std::abs(found - expected) < 1e-5 * expected ? 0 : 1;
}
