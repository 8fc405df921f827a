// An ordinary LibTorch training loop. The lines that microreg adds are marked; the commented-out ones are what they
// replace.
#include <torch/torch.h>

#include <cmath>
#include <cstdio>
#include <microreg/microreg.hpp>  // microreg

// Two noisy rings of points, one class each.
class Rings : public torch::data::Dataset<Rings> {
 public:
  Rings() : labels_(torch::randint(2, {512})) {
    const auto angle = torch::rand({512}) * 6.2832;
    const auto radius = 1 + labels_ + 0.2 * torch::randn({512});
    points_ = torch::stack({radius * angle.cos(), radius * angle.sin()}, 1);
  }
  torch::data::Example<> get(std::size_t index) override {
    const auto i = static_cast<std::int64_t>(index);
    return {points_[i], labels_[i]};
  }
  torch::optional<std::size_t> size() const override { return 512; }

 private:
  torch::Tensor labels_;
  torch::Tensor points_;
};

int main() {
  torch::manual_seed(0);
  auto dataset = Rings().map(torch::data::transforms::Stack<>());
  auto loader = torch::data::make_data_loader<torch::data::samplers::RandomSampler>(std::move(dataset), 128);

  torch::nn::Sequential model(torch::nn::Linear(2, 32), torch::nn::Tanh(), torch::nn::Linear(32, 2));
  torch::nn::CrossEntropyLoss criterion;
  torch::optim::SGD optimizer(model->parameters(), 0.5);

  microreg::Penalised penalised(model->parameters(), microreg::GradientNorm{}, {.strength = 0.01});  // microreg

  double first = 0;
  double last = 0;
  for (int epoch = 1; epoch <= 30; ++epoch) {
    double sum = 0;
    int batches = 0;
    for (auto& batch : *loader) {
      optimizer.zero_grad();
      for (auto [part, x, y] : microreg::micro_batches(32, batch.data, batch.target)) {  // microreg
        // auto loss = criterion(model->forward(batch.data), batch.target);
        auto loss = criterion(model->forward(x), y);  // microreg
        // loss.backward();
        penalised.backward(part, loss);            // microreg
        sum += part.weight * loss.item<double>();  // microreg
      }
      optimizer.step();
      ++batches;
    }
    last = sum / batches;
    first = epoch == 1 ? last : first;
    if (epoch == 1 || epoch % 10 == 0) {
      std::printf("epoch %2d  loss %.4f\n", epoch, last);
    }
  }
  return std::isfinite(last) && last < 0.5 * first ? 0 : 1;  // it learns
}
