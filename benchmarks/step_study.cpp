// The error of finite differences against the step, on random ReLU networks: what the automatic step was chosen from,
// and the data of the plot in docs/estimators.md (plot_steps.py).
//
//     step_study --out steps.json [--seeds 5]
//
// Every row is one estimator at one step on one network: the relative error of the gradient of GradientNorm's penalty
// against double backward in the same type. Steps are relative to the norm of the parameters; 0 is the automatic one.
#include <microreg/microreg.hpp>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <cmath>
#include <cstdint>
#include <fstream>
#include <string>
#include <vector>

namespace {

/// Three blocks of convolution, batch normalisation if asked for, ReLU and max pooling.
torch::nn::Sequential make_network(bool batch_norm, torch::ScalarType type, std::uint64_t seed) {
  torch::manual_seed(seed);
  torch::nn::Sequential network;
  std::int64_t channels = 3;
  for (const std::int64_t width : {16, 24, 32}) {
    network->push_back(torch::nn::Conv2d(torch::nn::Conv2dOptions(channels, width, 3).padding(1)));
    if (batch_norm) {
      network->push_back(torch::nn::BatchNorm2d(width));
    }
    network->push_back(torch::nn::ReLU());
    network->push_back(torch::nn::MaxPool2d(2));
    channels = width;
  }
  network->push_back(torch::nn::Flatten());
  network->push_back(torch::nn::Linear(channels * 4, 10));
  network->to(type);
  return network;
}

struct Problem {
  torch::nn::Sequential network;
  torch::Tensor images, labels;

  /// The gradient of loss and penalty, or of the loss alone with strength 0, as one vector.
  [[nodiscard]] torch::Tensor gradient(double strength, const microreg::Estimator& estimator) {
    network->zero_grad();
    microreg::Regularizer regularizer(
        network, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{},
        {.strength = strength, .estimator = estimator, .check_finite = microreg::CheckFinite::never});
    (void)regularizer.backward(images, labels);
    std::vector<torch::Tensor> parts;
    for (const torch::Tensor& parameter : network->parameters()) {
      parts.push_back(parameter.grad().detach().to(torch::kDouble).flatten());
    }
    return torch::cat(parts);
  }
};

double parameter_norm(const torch::nn::Sequential& network) {
  double squared = 0;
  for (const torch::Tensor& parameter : network->parameters()) {
    squared += parameter.detach().to(torch::kDouble).square().sum().item<double>();
  }
  return std::sqrt(squared);
}

std::vector<double> steps() {
  std::vector<double> result{0};
  for (int half_decade = -16; half_decade <= -2; ++half_decade) {
    result.push_back(std::pow(10.0, half_decade / 2.0));
  }
  return result;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Error of finite differences against the step");
  std::string out = "steps.json";
  std::uint64_t seeds = 5;
  app.add_option("--out", out, "where to write the rows");
  app.add_option("--seeds", seeds, "networks of each kind");
  CLI11_PARSE(app, argc, argv);

  nlohmann::json rows = nlohmann::json::array();
  for (std::uint64_t seed = 0; seed < seeds; ++seed) {
    for (const bool batch_norm : {false, true}) {
      for (const torch::ScalarType type : {torch::kFloat32, torch::kFloat64}) {
        Problem problem{make_network(batch_norm, type, seed), torch::randn({32, 3, 16, 16}, torch::kFloat64).to(type),
                        torch::randint(10, {32})};
        const torch::Tensor loss = problem.gradient(0, microreg::Exact{});
        const torch::Tensor exact = problem.gradient(1, microreg::Exact{}) - loss;
        const double norm = parameter_norm(problem.network);
        const auto add = [&](const char* estimator, const char* gates, double relative,
                             const microreg::Estimator& options) {
          const torch::Tensor estimate = problem.gradient(1, options) - loss;
          rows.push_back({{"seed", seed},
                          {"batch_norm", batch_norm},
                          {"dtype", type == torch::kFloat32 ? "float32" : "float64"},
                          {"estimator", estimator},
                          {"gates", gates},
                          {"relative_step", relative},
                          {"parameter_norm", norm},
                          {"relative_error", ((estimate - exact).norm() / exact.norm()).item<double>()}});
        };
        for (const double relative : steps()) {
          for (const auto gates : {microreg::Gates::frozen, microreg::Gates::free}) {
            const char* name = gates == microreg::Gates::frozen ? "frozen" : "free";
            add("forward", name, relative, microreg::ForwardDifference{relative * norm, gates});
            add("central", name, relative, microreg::CentralDifference{relative * norm, gates});
          }
        }
      }
    }
  }
  std::ofstream(out) << rows.dump(1) << "\n";
}
