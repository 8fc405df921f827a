// Which parameters count: frozen, unused, shared and selected ones, and models without a second-order part.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/microreg.hpp>

using namespace helpers;

namespace {

const auto all_four =
    microreg::GradientNorm{} + microreg::FisherTrace{} + microreg::AverageJacobian{} + microreg::UnitJacobian{};

}  // namespace

TEST_CASE("trainable drops frozen, undefined and repeated parameters", "[parameters]") {
  const torch::Tensor a = torch::ones({2}).requires_grad_(true);
  const torch::Tensor b = torch::ones({3}).requires_grad_(true);
  const microreg::Parameters found =
      microreg::trainable({{"a", a}, {"frozen", torch::ones({2})}, {"again", a}, {"none", torch::Tensor()}, {"b", b}},
                          [](const std::string& name, const torch::Tensor&) { return name == "b"; });
  REQUIRE(found.tensors.size() == 2);
  CHECK(found.tensors[0].is_same(a));
  CHECK(found.tensors[1].is_same(b));
  CHECK(found.names == std::vector<std::string>{"a", "b"});
  CHECK(found.selected == std::vector<std::size_t>{1});
}

TEST_CASE("frozen parameters take no part and receive nothing", "[parameters]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(10);
  model->hidden->weight.requires_grad_(false);
  microreg::Regularizer regularizer(model, cross_entropy, 0.5 * microreg::GradientNorm{}, {.micro_batch_size = 10});
  const auto report = regularizer.backward(batch.input, batch.target);
  CHECK_FALSE(model->hidden->weight.grad().defined());
  const torch::Tensor grad = flat_grad(model->parameters());

  const std::vector<torch::Tensor> rest{model->hidden->bias, model->output->weight, model->output->bias};
  const torch::Tensor loss = torch::cross_entropy_loss(model->forward(batch.input), batch.target);
  const auto parts = torch::autograd::grad({loss}, rest, {}, true, true);
  const torch::Tensor value = parts[0].square().sum() + parts[1].square().sum() + parts[2].square().sum();
  CHECK(relative_error(report.penalties[0].value, value) < 1e-13);
  clear_grad(model->parameters());
  (loss + 0.5 * value).backward();
  CHECK(relative_error(grad, flat_grad(model->parameters())) < 1e-13);
}

TEST_CASE("unused parameters count as zero and keep their .grad", "[parameters]") {
  auto model = networks::seeded_mlp();
  model->register_module("unused", torch::nn::Linear(3, 3))->to(torch::kFloat64);
  const auto batch = networks::vectors(10);
  microreg::Regularizer regularizer(model, cross_entropy, all_four, {.micro_batch_size = 4});
  (void)regularizer.backward(batch.input, batch.target);
  for (const auto& item : model->named_parameters()) {
    CHECK(item.value().grad().defined() == (item.key().find("unused") == std::string::npos));
  }
}

TEST_CASE("a shared parameter counts once, with the sum of its gradients", "[parameters]") {
  torch::manual_seed(91);
  torch::nn::Linear layer(4, 4);
  layer->to(torch::kFloat64);
  // The same module twice, under two names.
  torch::nn::Sequential model(layer, torch::nn::Tanh(), layer);
  const torch::Tensor x = torch::randn({6, 4}, torch::kFloat64);
  const auto mse = [](const torch::Tensor& o, const torch::Tensor& y) { return torch::mse_loss(o, y); };
  microreg::Regularizer regularizer(model, mse, microreg::GradientNorm{}, {.strength = 0.5, .micro_batch_size = 6});
  const auto report = regularizer.backward(x, x);
  const torch::Tensor grad = flat_grad(layer->parameters());
  clear_grad(layer->parameters());
  const torch::Tensor loss = torch::mse_loss(layer(layer(x).tanh()), x);
  const auto parts = torch::autograd::grad({loss}, layer->parameters(), {}, true, true);
  const torch::Tensor value = parts[0].square().sum() + parts[1].square().sum();
  (loss + 0.5 * value).backward();
  CHECK(relative_error(report.penalties[0].value, value) < 1e-13);
  CHECK(relative_error(grad, flat_grad(layer->parameters())) < 1e-13);
  // The functor, given the list with repetitions.
  const torch::Tensor functor = microreg::GradientNorm{}(torch::mse_loss(model->forward(x), x), model->parameters());
  CHECK(relative_error(functor, value) < 1e-13);
}

TEST_CASE("parameters whose gradients are one and the same tensor", "[parameters]") {
  // Both have the gradient of their sum, in one tensor; neither may be written through the other.
  torch::manual_seed(92);
  const torch::Tensor a = torch::randn({3}, torch::kFloat64).requires_grad_(true);
  const torch::Tensor b = torch::randn({3}, torch::kFloat64).requires_grad_(true);
  const microreg::FunctionModel model{[&](const torch::Tensor& x) { return (x + (a + b)).tanh(); }, {a, b}};
  const torch::Tensor x = torch::randn({6, 3}, torch::kFloat64);
  microreg::Regularizer regularizer(
      model, [](const torch::Tensor& o, const torch::Tensor& y) { return torch::mse_loss(o, y); },
      microreg::GradientNorm{}, {.micro_batch_size = 6});
  (void)regularizer.backward(x, 2 * x);
  const torch::Tensor grad = flat_grad({a, b});
  CHECK_FALSE(a.grad().storage().is_alias_of(b.grad().storage()));
  clear_grad({a, b});
  const torch::Tensor loss = torch::mse_loss((x + (a + b)).tanh(), 2 * x);
  const auto parts = torch::autograd::grad({loss}, {a, b}, {}, true, true);
  (loss + parts[0].square().sum() + parts[1].square().sum()).backward();
  CHECK(relative_error(grad, flat_grad({a, b})) < 1e-13);
}

TEST_CASE("select penalises some parameters and trains all", "[parameters]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(8);
  const auto select = [](const std::string& name, const torch::Tensor& p) {
    return name == "hidden.weight" && p.dim() == 2;
  };
  const auto check = [&](const auto& penalty, const auto& probe) {
    clear_grad(model->parameters());
    microreg::Regularizer regularizer(model, cross_entropy, penalty,
                                      {.strength = 0.5, .micro_batch_size = 8, .select = select});
    const auto report = regularizer.backward(batch.input, batch.target);
    const torch::Tensor grad = flat_grad(model->parameters());
    clear_grad(model->parameters());
    const torch::Tensor output = model->forward(batch.input);
    const torch::Tensor loss = torch::cross_entropy_loss(output, batch.target);
    const torch::Tensor value =
        torch::autograd::grad({probe(output, loss)}, {model->hidden->weight}, {}, true, true)[0].square().sum();
    (loss + 0.5 * value).backward();
    CHECK(relative_error(report.penalties[0].value, value) < 1e-13);
    CHECK(relative_error(grad, flat_grad(model->parameters())) < 1e-13);
  };
  check(microreg::GradientNorm{}, [](const torch::Tensor&, const torch::Tensor& loss) { return loss; });
  check(microreg::AverageJacobian{}, [](const torch::Tensor& o, const torch::Tensor&) { return o.mean(0).sum(); });
}

TEST_CASE("a model without a second-order part: a zero, not a crash", "[parameters]") {
  torch::manual_seed(93);
  torch::nn::Linear model(6, networks::classes);
  model->to(torch::kFloat64);
  const auto batch = networks::vectors(10);
  torch::cross_entropy_loss(model(batch.input), batch.target).backward();
  const torch::Tensor plain = flat_grad(model->parameters());
  clear_grad(model->parameters());
  microreg::Regularizer regularizer(model, cross_entropy, microreg::AverageJacobian{} + microreg::UnitJacobian{},
                                    {.strength = 3.0, .micro_batch_size = 4});
  const auto report = regularizer.backward(batch.input, batch.target);
  CHECK(relative_error(flat_grad(model->parameters()), plain) < 1e-13);
  CHECK(report.penalties[0].value.item<double>() > 1);

  // The functor's result can be added to the loss all the same.
  clear_grad(model->parameters());
  const torch::Tensor output = model(batch.input);
  const torch::Tensor loss = torch::cross_entropy_loss(output, batch.target);
  (loss + 3.0 * microreg::AverageJacobian{}(output, model->parameters())).backward();
  CHECK(relative_error(flat_grad(model->parameters()), plain) < 1e-13);
}
