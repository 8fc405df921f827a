// A trainer as programs have it: a class that owns model, optimizer and regularizer, and a penalty that is chosen by
// name when the program starts.
//
//     trainer_class [gradient-norm|fisher-trace|average-jacobian|unit-jacobian|none] [strength]
#include <torch/torch.h>

#include <cstdio>
#include <microreg/microreg.hpp>
#include <stdexcept>
#include <string>

// From a command line or a configuration file: every penalty is an AnyPenalty<>.
microreg::AnyPenalty<> penalty_called(const std::string& name) {
  if (name == "gradient-norm") {
    return microreg::GradientNorm{};
  }
  if (name == "fisher-trace") {
    return microreg::FisherTrace{};
  }
  if (name == "average-jacobian") {
    return microreg::AverageJacobian{};
  }
  if (name == "unit-jacobian") {
    return microreg::UnitJacobian{};
  }
  if (name == "none") {
    return {};
  }
  throw std::invalid_argument("no penalty is called " + name);
}

class Trainer {
 public:
  Trainer(const std::string& penalty, double strength)
      : model_(torch::nn::Linear(2, 32), torch::nn::Tanh(), torch::nn::Linear(32, 2)),
        optimizer_(model_->parameters(), torch::optim::SGDOptions(0.5)),
        regularizer_(model_, torch::nn::CrossEntropyLoss(), penalty_called(penalty),
                     {.strength = strength, .micro_batch_size = 32, .keep_outputs = true}) {}

  microreg::Report step(const torch::Tensor& points, const torch::Tensor& labels) {
    optimizer_.zero_grad();
    auto report = regularizer_.backward(points, labels);
    optimizer_.step();
    return report;
  }

 private:
  torch::nn::Sequential model_;
  torch::optim::SGD optimizer_;
  microreg::Regularizer<> regularizer_;
};

int main(int argc, char** argv) {
  try {
    torch::manual_seed(0);
    Trainer trainer(argc > 1 ? argv[1] : "gradient-norm", argc > 2 ? std::stod(argv[2]) : 0.01);

    // Two noisy rings of points, one class each.
    const auto labels = torch::randint(2, {256});
    const auto angle = torch::rand({256}) * 6.2832;
    const auto radius = 1 + labels + 0.2 * torch::randn({256});
    const auto points = torch::stack({radius * angle.cos(), radius * angle.sin()}, 1);

    double accuracy = 0;
    for (int step = 1; step <= 60; ++step) {
      const auto report = trainer.step(points, labels);
      accuracy = report.output().argmax(1).eq(labels).to(torch::kFloat32).mean().item<double>();
      if (step % 20 == 0) {
        std::printf("step %2d  loss %.4f", step, report.loss.item<double>());
        for (const auto& penalty : report.penalties) {
          std::printf("  %s %.4f", penalty.name.c_str(), penalty.value.item<double>());
        }
        std::printf("  accuracy %.3f\n", accuracy);
      }
    }
    return accuracy > 0.9 ? 0 : 1;  // it learns
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
}
