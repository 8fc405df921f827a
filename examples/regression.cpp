// A regression: noisy measurements of two quantities, some of which are missing, and a network that is large enough to
// learn the noise. A penalty on how fast its output changes with the input keeps it from that.
#include <torch/torch.h>

#include <cstdio>
#include <limits>
#include <microreg/microreg.hpp>

/// What is measured, [N, 3] to [N, 2].
torch::Tensor truth(const torch::Tensor& x) {
  return torch::stack({(2 * x.select(1, 0)).sin() + x.select(1, 1), x.select(1, 1) * x.select(1, 2)}, 1);
}

/// Trains on the measurements and returns the mean squared error to what was to be measured.
double train(double strength) {
  torch::manual_seed(0);
  const auto inputs = 2 * torch::rand({128, 3}) - 1;
  auto targets = truth(inputs) + 0.5 * torch::randn({128, 2});  // [N, 2] as the output: [N] would broadcast
  targets.masked_fill_(torch::rand({128, 2}) < 0.2, std::numeric_limits<float>::quiet_NaN());
  torch::nn::Sequential model(torch::nn::Linear(3, 64), torch::nn::SiLU(), torch::nn::Linear(64, 64), torch::nn::SiLU(),
                              torch::nn::Linear(64, 2));
  torch::optim::Adam optimizer(model->parameters(), torch::optim::AdamOptions(0.01));

  // [regression]
  // A sum and how many it is over: micro-batches count by the values that they have.
  auto loss = [](const torch::Tensor& output, const torch::Tensor& target) {
    const auto known = ~target.isnan();
    return microreg::CountedLoss{((output - target.nan_to_num()).square() * known).sum(), known.sum()};
  };
  microreg::InputJacobian penalty{.expectation = microreg::Expectation::exact};  // two outputs: two passes
  microreg::Regularizer regularizer(model, loss, penalty, {.strength = strength, .micro_batch_size = 64});
  for (int step = 0; step < 300; ++step) {
    optimizer.zero_grad();
    regularizer.backward(inputs, targets);
    optimizer.step();
  }
  // [end]

  const auto unseen = 2 * torch::rand({1000, 3}) - 1;
  const auto error = torch::mse_loss(model->forward(unseen), truth(unseen)).item<double>();
  const auto found = microreg::measure(model, loss, penalty, inputs, targets);
  std::printf("strength %-5g training loss %.3f, error on unseen inputs %.3f, squared norm of the Jacobian %.2f\n",
              strength, found.loss.item<double>(), error, found.penalties[0].value.item<double>());
  return error;
}

int main() {
  const double plain = train(0);
  const double penalised = train(0.02);
  return penalised < 0.8 * plain ? 0 : 1;
}
