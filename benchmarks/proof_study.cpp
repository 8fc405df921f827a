// How near correct differences come to the tolerance of their own proof, and what a proof costs.
//
//     proof_study [--steps 20] [--only resnet18]
//
// Every network is trained by SGD. In every step the gradient of GradientNorm's penalty by double backward is compared
// with a difference at the automatic step from the same parameters, buffers and random numbers (`largest` over the
// steps), and with one that is proven in every step (`proven`, `refused`). `cost` is the time of a step with a proof
// over that of one without, medians, one micro-batch a step.
#include "models.hpp"

#include <microreg/microreg.hpp>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

namespace {

using torch::Tensor;

/// A block of attention by matrix products and an MLP with GELU, both residual.
struct TransformerImpl : torch::nn::Module {
  TransformerImpl() {
    register_module("embed", embed);
    register_module("first", first);
    register_module("qkv", qkv);
    register_module("project", project);
    register_module("second", second);
    register_module("up", up);
    register_module("down", down);
    register_module("head", head);
  }
  Tensor forward(const Tensor& tokens) {
    Tensor h = embed(tokens);
    const auto parts = qkv(first(h)).chunk(3, -1);
    h = h + project(torch::matmul(torch::softmax(torch::matmul(parts[0], parts[1].transpose(1, 2)) / 8, -1), parts[2]));
    h = h + down(torch::dropout(torch::gelu(up(second(h))), 0.1, is_training()));
    return head(h.mean(1));
  }
  torch::nn::Embedding embed{100, 64};
  torch::nn::LayerNorm first{torch::nn::LayerNormOptions({64})}, second{torch::nn::LayerNormOptions({64})};
  torch::nn::Linear qkv{64, 192}, project{64, 64}, up{64, 256}, down{256, 64}, head{64, 10};
};
TORCH_MODULE(Transformer);

struct RecurrentImpl : torch::nn::Module {
  RecurrentImpl() {
    register_module("embed", embed);
    register_module("lstm", lstm);
    register_module("head", head);
  }
  Tensor forward(const Tensor& tokens) { return head(std::get<0>(lstm(embed(tokens))).select(1, -1)); }
  torch::nn::Embedding embed{100, 32};
  torch::nn::LSTM lstm{torch::nn::LSTMOptions(32, 64).batch_first(true)};
  torch::nn::Linear head{64, 10};
};
TORCH_MODULE(Recurrent);

struct Network {
  std::string name;
  bool tokens;
  std::function<microreg::FunctionModel<std::function<Tensor(const Tensor&)>>(torch::ScalarType)> make;
};

template <class Make>
Network network(std::string name, bool tokens, Make make) {
  return {std::move(name), tokens, [make](torch::ScalarType type) {
            auto module = make();
            module->to(type);
            return microreg::FunctionModel<std::function<Tensor(const Tensor&)>>{
                [module](const Tensor& x) mutable { return module->forward(x); }, module->parameters(),
                module->buffers()};
          }};
}

std::vector<Network> networks() {
  const cifar::ModelOptions narrow{.width = 16};
  return {network("cnn", false, [=] { return cifar::make_cnn({}); }),
          network("resnet18 width 16", false, [=] { return cifar::make_resnet18(narrow); }),
          network("vgg11 width 16", false, [=] { return cifar::make_vgg11(narrow); }),
          network("vgg16_bn width 16", false, [=] { return cifar::make_vgg16_bn(narrow); }),
          network("dropout MLP", false,
                  [] {
                    return torch::nn::Sequential(torch::nn::Flatten(), torch::nn::Linear(3 * 32 * 32, 256),
                                                 torch::nn::ReLU(), torch::nn::Dropout(0.5),
                                                 torch::nn::Linear(256, 256), torch::nn::ReLU(),
                                                 torch::nn::Dropout(0.5), torch::nn::Linear(256, 10));
                  }),
          network("transformer", true, [] { return Transformer(); }),
          network("LSTM", true, [] { return Recurrent(); })};
}

double seconds(const std::function<void()>& call) {
  const auto begin = std::chrono::steady_clock::now();
  call();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

void study(const Network& network, torch::ScalarType type, bool central, int steps) {
  torch::manual_seed(1);
  auto model = network.make(type);
  torch::optim::SGD optimizer(model.parameters, torch::optim::SGDOptions(0.05).momentum(0.9));
  const auto estimator = [&](std::int64_t check_every) -> microreg::Estimator {
    if (central) {
      return microreg::CentralDifference{.check_every = check_every};
    }
    return microreg::ForwardDifference{.check_every = check_every};
  };
  const auto regularizer = [&](double strength, const microreg::Estimator& chosen) {
    return microreg::Regularizer(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{},
                                 {.strength = strength, .estimator = chosen});
  };
  auto plain = regularizer(0, microreg::Exact{});
  auto exact = regularizer(0.1, microreg::Exact{});
  auto unproven = regularizer(0.1, estimator(0));
  auto proven = regularizer(0.1, estimator(1));
  double largest = 0;
  double largest_proven = 0;
  int refused = 0;
  std::vector<double> with;
  std::vector<double> without;
  for (int step = 0; step < steps; ++step) {
    const Tensor x = network.tokens ? torch::randint(100, {32, 16}) : torch::randn({32, 3, 32, 32}).to(type);
    const Tensor y = torch::randint(10, {32});
    std::vector<Tensor> buffers;
    for (const Tensor& buffer : model.buffers) {
      buffers.push_back(buffer.clone());
    }
    auto random = at::globalContext().defaultGenerator(at::kCPU);
    const Tensor state = random.get_state();
    const auto gradient = [&](auto& chosen) {
      const torch::NoGradGuard no_grad;
      for (std::size_t i = 0; i < buffers.size(); ++i) {
        model.buffers[i].copy_(buffers[i]);
      }
      random.set_state(state);
      optimizer.zero_grad();
      const torch::AutoGradMode enable(true);
      (void)chosen.backward(x, y);
      std::vector<Tensor> parts;
      for (const Tensor& parameter : model.parameters) {
        parts.push_back(parameter.grad().detach().to(torch::kDouble).flatten());
      }
      return torch::cat(parts);
    };
    const Tensor loss = gradient(plain);
    Tensor by_difference;
    without.push_back(seconds([&] { by_difference = gradient(unproven); }));
    Tensor by_proven;
    with.push_back(seconds([&] {
      try {
        by_proven = gradient(proven);
      } catch (const microreg::DifferenceError& error) {
        ++refused;
        std::printf("refused: %s\n", error.what());
      }
    }));
    const Tensor right = gradient(exact);
    const auto off = [&](const Tensor& found) {
      return ((found - right).norm() / (right - loss).norm()).item<double>();
    };
    largest = std::max(largest, off(by_difference));
    largest_proven = by_proven.defined() ? std::max(largest_proven, off(by_proven)) : largest_proven;
    optimizer.step();
  }
  const double tolerance = type == torch::kDouble ? 1e-3 : central ? 2e-2 : 5e-2;
  std::printf("%-18s %-8s %-8s largest %8.2g proven %8.2g tolerance %6.2g refused %d of %d cost %.2f\n",
              network.name.c_str(), type == torch::kDouble ? "float64" : "float32", central ? "central" : "forward",
              largest, largest_proven, tolerance, refused, steps, median(with) / median(without));
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Correct differences against the tolerance of their proof");
  int steps = 20;
  std::string only;
  app.add_option("--steps", steps, "of SGD, for each network");
  app.add_option("--only", only, "networks whose name has this in it");
  CLI11_PARSE(app, argc, argv);
  for (const Network& each : networks()) {
    if (each.name.find(only) == std::string::npos) {
      continue;
    }
    for (const torch::ScalarType type : {torch::kFloat32, torch::kDouble}) {
      for (const bool central : {false, true}) {
        study(each, type, central, steps);
      }
    }
  }
}
