// graft: the direction of one gradient, the norm of another.
#include "helpers.hpp"
#include "networks.hpp"

#include <microreg/grafting.hpp>
#include <microreg/microreg.hpp>

using namespace helpers;

namespace {

std::vector<torch::Tensor> gradients_of(const torch::nn::Module& model) {
  std::vector<torch::Tensor> gradients;
  for (const torch::Tensor& parameter : model.parameters()) {
    gradients.push_back(parameter.grad().clone());
  }
  return gradients;
}

double joint_norm(const std::vector<torch::Tensor>& tensors) {
  double sum = 0;
  for (const torch::Tensor& tensor : tensors) {
    sum += tensor.to(torch::kDouble).square().sum().item<double>();
  }
  return std::sqrt(sum);
}

}  // namespace

TEST_CASE("graft keeps the direction and sets the joint norm", "[grafting]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(8);
  torch::cross_entropy_loss(model->forward(batch.input), batch.target).backward();
  const auto before = gradients_of(*model);
  const double old_norm = joint_norm(before);

  const bool as_tensor = GENERATE(false, true);
  const double norm = GENERATE(0.25, 3.0, 0.0);
  const torch::Tensor returned = as_tensor ? microreg::graft(model->parameters(), helpers::tensor(norm, torch::kFloat))
                                           : microreg::graft(model->parameters(), norm);
  CHECK(returned.item<double>() == Approx(old_norm).epsilon(1e-12));
  const auto after = gradients_of(*model);
  CHECK(joint_norm(after) == Approx(norm).epsilon(1e-12).margin(1e-300));
  for (std::size_t i = 0; i < before.size(); ++i) {
    CHECK(torch::allclose(after[i], before[i] * (norm / old_norm), 1e-12, 1e-300));
  }
}

TEST_CASE("the iterative form takes the norm of one micro-batch's gradient", "[grafting]") {
  auto model = networks::seeded_mlp();
  const auto batch = networks::vectors(12);
  const auto loss_of = [&](std::int64_t begin, std::int64_t length) {
    return torch::cross_entropy_loss(model->forward(batch.input.narrow(0, begin, length)),
                                     batch.target.narrow(0, begin, length));
  };
  const auto micro_batch = torch::autograd::grad({loss_of(0, 4)}, model->parameters());
  const auto whole = torch::autograd::grad({loss_of(0, 12)}, model->parameters());

  microreg::Regularizer regularizer(model, cross_entropy, microreg::GradientNorm{},
                                    {.strength = 0, .micro_batch_size = 4});
  const auto report = regularizer.backward(batch.input, batch.target);
  microreg::graft(model->parameters(), report.penalties[0].micro_batch_norms[0]);
  const double scale = joint_norm(micro_batch) / joint_norm(whole);
  const auto grafted = gradients_of(*model);
  for (std::size_t i = 0; i < whole.size(); ++i) {
    CHECK(torch::allclose(grafted[i], whole[i] * scale, 1e-10, 1e-12));
  }
}

TEST_CASE("graft passes over what has no gradient, keeps zero, and takes half types", "[grafting]") {
  const auto parameter = [](torch::ScalarType type) { return torch::ones({3}, type).requires_grad_(); };
  torch::Tensor frozen = torch::ones({3});
  torch::Tensor zero = parameter(torch::kFloat);
  zero.mutable_grad() = torch::zeros({3});
  const std::vector<torch::Tensor> some{frozen, torch::Tensor(), zero};
  microreg::graft(some, 2.0);
  CHECK_FALSE(frozen.grad().defined());
  CHECK(zero.grad().equal(torch::zeros({3})));

  torch::Tensor half = parameter(torch::kBFloat16);
  half.mutable_grad() = torch::full({3}, 4, torch::kBFloat16);
  torch::Tensor full = parameter(torch::kFloat);
  full.mutable_grad() = torch::full({3}, 4.0);
  microreg::graft(std::vector<torch::Tensor>{half, full}, std::sqrt(6.0));
  CHECK(half.grad().scalar_type() == torch::kBFloat16);
  CHECK(half.grad().equal(torch::ones({3}, torch::kBFloat16)));
  CHECK(torch::allclose(full.grad(), torch::ones({3})));
}

TEST_CASE("graft refuses what it cannot do, and changes nothing then", "[grafting]") {
  torch::Tensor parameter = torch::ones({2}, torch::requires_grad());
  const std::vector<torch::Tensor> parameters{parameter};
  CHECK(has(message_of<microreg::ModelError>([&] { microreg::graft(parameters, 1.0); }),
            {"none of the 1 parameters has a gradient", "backward()"}));
  parameter.mutable_grad() = torch::ones({2});
  CHECK(has(message_of<microreg::OptionError>([&] { microreg::graft(parameters, std::nan("")); }), {"nan", "finite"}));
  CHECK(has(message_of<microreg::OptionError>([&] { microreg::graft(parameters, -1.0); }), {"-1", "at least 0"}));
  CHECK(has(message_of<microreg::OptionError>([&] { microreg::graft(parameters, torch::ones({3})); }), {"3 values"}));
  CHECK(has(message_of<microreg::OptionError>([&] { microreg::graft(parameters, torch::Tensor()); }), {"0 values"}));
  CHECK(parameter.grad().equal(torch::ones({2})));
}
