// microreg in a training step, in its three ways of use. All give the same gradient to rounding, which this program
// checks.
#include <torch/torch.h>

#include <algorithm>
#include <cstdio>
#include <microreg/microreg.hpp>
#include <vector>

std::vector<torch::Tensor> gradients(const torch::nn::Sequential& model) {
  std::vector<torch::Tensor> result;
  for (const auto& parameter : model->parameters()) {
    result.push_back(parameter.grad().clone());
  }
  return result;
}

int main() {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(8, 32), torch::nn::Tanh(), torch::nn::Linear(32, 4));
  torch::optim::SGD optimizer(model->parameters(), 0.1);
  const auto images = torch::randn({64, 8});
  const auto labels = torch::randint(4, {64});

  // [regularizer]
  microreg::Regularizer regularizer(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{},
                                    {.strength = 0.01, .micro_batch_size = 16});
  optimizer.zero_grad();
  auto report = regularizer.backward(images, labels);  // fills .grad, one micro-batch at a time
  // optimizer.step();
  // [end]
  const auto by_regularizer = gradients(model);

  // [penalised]
  microreg::Penalised penalised(model->parameters(), microreg::GradientNorm{}, {.strength = 0.01});
  torch::nn::CrossEntropyLoss criterion;
  optimizer.zero_grad();
  for (auto [part, x, y] : microreg::micro_batches(16, images, labels)) {
    auto loss = criterion(model->forward(x), y);
    penalised.backward(part, loss);  // instead of loss.backward()
  }
  // optimizer.step();
  // [end]
  const auto by_penalised = gradients(model);

  // [functor]
  optimizer.zero_grad();
  for (std::int64_t i = 0; i < 4; ++i) {  // four micro-batches of 16
    auto loss = criterion(model->forward(images.narrow(0, 16 * i, 16)), labels.narrow(0, 16 * i, 16));
    auto penalty = microreg::GradientNorm{}(loss, model->parameters());  // a scalar that carries a graph
    ((loss + 0.01 * penalty) / 4).backward();
  }
  // optimizer.step();
  // [end]
  const auto by_functor = gradients(model);

  double difference = 0;
  for (std::size_t i = 0; i < by_functor.size(); ++i) {
    for (const auto& other : {by_functor[i], by_penalised[i]}) {
      difference = std::max(difference, (other - by_regularizer[i]).abs().max().item<double>());
    }
  }
  std::printf("loss %.4f, penalty %.4f, largest difference between the gradients %.1e\n", report.loss.item<double>(),
              report.penalties[0].value.item<double>(), difference);
  return difference < 1e-6 ? 0 : 1;
}
