// Every kind of model gives the same gradient.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>

using namespace helpers;

namespace {

const networks::Samples& batch() {
  static const networks::Samples samples = [] {
    torch::manual_seed(41);
    return networks::vectors(10);
  }();
  return samples;
}

template <class Model>
torch::Tensor gradient(Model&& model, const std::vector<torch::Tensor>& parameters) {
  clear_grad(parameters);
  microreg::Regularizer regularizer(std::forward<Model>(model), cross_entropy, microreg::GradientNorm{},
                                    {.strength = 0.5, .micro_batch_size = 4});
  (void)regularizer.backward(batch().input, batch().target);
  return flat_grad(parameters);
}

/// The functor's gradient of the same objective, over the same micro-batches.
torch::Tensor expected(networks::Mlp mlp) {
  clear_grad(mlp->parameters());
  for (const auto& [begin, size] : {std::pair{0, 4}, {4, 4}, {8, 2}}) {
    const torch::Tensor loss = torch::cross_entropy_loss(mlp->forward(batch().input.narrow(0, begin, size)),
                                                         batch().target.narrow(0, begin, size));
    (size / 10.0 * (loss + 0.5 * microreg::GradientNorm{}(loss, mlp->parameters()))).backward();
  }
  return flat_grad(mlp->parameters());
}

/// Two inputs, so that a tuple is spread over the arguments.
struct BilinearImpl : torch::nn::Module {
  torch::Tensor forward(const torch::Tensor& a, const torch::Tensor& b) { return layer(torch::cat({a, b}, 1)); }
  torch::nn::Linear layer{register_module("layer", torch::nn::Linear(6, networks::classes))};
};
TORCH_MODULE(Bilinear);

/// A model whose output is no tensor: penalties that read the loss, or a probe of the user's, still work.
struct TwoHeadsImpl : torch::nn::Module {
  std::tuple<torch::Tensor, torch::Tensor> forward(const torch::Tensor& x) { return {a(x), b(x)}; }
  torch::nn::Linear a{register_module("a", torch::nn::Linear(6, 2))};
  torch::nn::Linear b{register_module("b", torch::nn::Linear(6, 1))};
};
TORCH_MODULE(TwoHeads);

}  // namespace

TEST_CASE("every kind of model gives the same gradient", "[model]") {
  networks::Mlp holder = networks::seeded_mlp();
  const auto parameters = holder->parameters();
  const torch::Tensor exact = expected(holder);
  const auto agrees = [&](const torch::Tensor& found) { CHECK(relative_error(found, exact) < 1e-13); };

  SECTION("module holder") { agrees(gradient(holder, parameters)); }
  SECTION("shared_ptr") { agrees(gradient(holder.ptr(), parameters)); }
  SECTION("reference to a Module subclass") { agrees(gradient(*holder, parameters)); }
  SECTION("AnyModule") { agrees(gradient(torch::nn::AnyModule(holder), parameters)); }
  SECTION("Sequential") {
    torch::nn::Sequential sequential(holder->hidden, torch::nn::Functional(torch::tanh), holder->output);
    agrees(gradient(sequential, parameters));
  }
  SECTION("FunctionModel") {
    const microreg::FunctionModel model{[=](const torch::Tensor& x) { return networks::Mlp(holder)->forward(x); },
                                        parameters};
    agrees(gradient(model, parameters));
  }
  SECTION("torch::jit::Module") {
    torch::jit::Module script("scripted");
    script.register_parameter("w1", holder->hidden->weight, false);
    script.register_parameter("b1", holder->hidden->bias, false);
    script.register_parameter("w2", holder->output->weight, false);
    script.register_parameter("b2", holder->output->bias, false);
    script.define(R"(
      def forward(self, x):
          return torch.matmul(torch.tanh(torch.matmul(x, self.w1.t()) + self.b1), self.w2.t()) + self.b2
    )");
    // Twice: the graph executor profiles the first runs and then optimises.
    agrees(gradient(script, parameters));
    agrees(gradient(script, parameters));
    agrees(gradient(script, parameters));
  }
}

TEST_CASE("a tuple of inputs is spread over the model's arguments", "[model]") {
  torch::manual_seed(42);
  Bilinear model;
  const auto input = std::make_tuple(torch::randn({10, 2}), torch::randn({10, 4}));
  const auto run = [&](auto&& any_model) {
    clear_grad(model->parameters());
    microreg::Regularizer<std::tuple<torch::Tensor, torch::Tensor>> regularizer(
        any_model, cross_entropy, microreg::GradientNorm{}, {.micro_batch_size = 4});
    (void)regularizer.backward(input, batch().target);
    return flat_grad(model->parameters());
  };
  const torch::Tensor exact = run(model);
  CHECK(exact.norm().item<double>() > 0);
  CHECK(relative_error(run(torch::nn::AnyModule(model)), exact) < 1e-6);
  torch::jit::Module script("scripted");
  script.register_parameter("w", model->layer->weight, false);
  script.register_parameter("b", model->layer->bias, false);
  script.define(R"(
    def forward(self, a, c):
        return torch.matmul(torch.cat([a, c], 1), self.w.t()) + self.b
  )");
  CHECK(relative_error(run(script), exact) < 1e-5);
}

TEST_CASE("a model that returns a tuple", "[model]") {
  torch::manual_seed(43);
  TwoHeads model;
  const auto loss = [](const std::tuple<torch::Tensor, torch::Tensor>& heads, const torch::Tensor& y) {
    return torch::cross_entropy_loss(std::get<0>(heads), y) + std::get<1>(heads).square().mean();
  };
  const microreg::SquaredGradientNorm second_head{
      [](const std::tuple<torch::Tensor, torch::Tensor>& heads) { return std::get<1>(heads).tanh().mean(); }};
  microreg::Regularizer regularizer(model, loss, microreg::GradientNorm{} + second_head, {.micro_batch_size = 4});
  const auto report = regularizer.backward(torch::randn({10, 6}), torch::randint(2, {10}));
  CHECK(report.penalties[1].value.item<double>() > 0);
  CHECK(flat_grad(model->parameters()).norm().item<double>() > 0);
}

TEST_CASE("FunctionModel's buffers are put back after an error", "[model]") {
  const torch::Tensor w = torch::ones({6, 3}).requires_grad_(true);
  torch::Tensor calls = torch::zeros({});
  microreg::Regularizer regularizer(microreg::FunctionModel{[&](const torch::Tensor& x) {
                                                              calls += 1;
                                                              return x.matmul(w);
                                                            },
                                                            {w},
                                                            {calls}},
                                    [&](const torch::Tensor& output, const torch::Tensor&) -> torch::Tensor {
                                      if (calls.item<float>() > 1) {
                                        throw std::runtime_error("second micro-batch");
                                      }
                                      return output.mean();
                                    },
                                    microreg::GradientNorm{}, {.micro_batch_size = 2});
  CHECK_THROWS_AS(regularizer.backward(torch::ones({4, 6}), torch::ones({4})), std::runtime_error);
  CHECK(calls.item<float>() == 0);
  CHECK_FALSE(w.grad().defined());
}

TEST_CASE("an empty model is named", "[model]") {
  const auto build = [](const auto& model) {
    return [model] { microreg::Regularizer regularizer(model, cross_entropy, microreg::GradientNorm{}); };
  };
  CHECK(has(message_of<microreg::ModelError>(build(networks::Mlp(nullptr))), {"empty holder", "construct"}));
  CHECK(has(message_of<microreg::ModelError>(build(std::shared_ptr<networks::MlpImpl>())), {"nullptr", "construct"}));
  CHECK(has(message_of<microreg::ModelError>(build(torch::nn::AnyModule())), {"AnyModule", "assign"}));
}
