// FisherTrace: the loss gradient with labels that the model draws.
#include "penalty_helpers.hpp"

#include <type_traits>

using namespace helpers;
using namespace penalty_helpers;
using microreg::Expectation;

TEST_CASE("the Fisher trace of given labels by hand", "[fisher_trace]") {
  const TanhNetwork network;
  const std::int64_t draws = GENERATE(1, 3);
  // A likelihood that is linear in the output, and labels that a generator gives.
  const auto label = [](const Tensor& output, const at::Generator& from) {
    return torch::empty_like(output).normal_(0, 1, from);
  };
  const microreg::Distribution linear{
      [&](const Tensor& output, const std::optional<at::Generator>& from) { return label(output.detach(), *from); },
      TanhNetwork::loss};
  const microreg::FisherTrace penalty{linear, draws};
  CHECK(penalty.name() == "fisher_trace");
  const at::Generator drawn = generator(6), drawn_by_hand = generator(6);
  network.check(
      penalty, [&](const Tensor& output, const Tensor&) { return penalty(output, {network.w}, drawn); },
      [&](const Tensor& rows, const Tensor& labels) {
        std::vector<Tensor> probes;
        for (std::int64_t k = 0; k < draws; ++k) {
          probes.push_back(network.of_loss(label(labels, drawn_by_hand)));
        }
        return network.squared_norm(rows, probes, 1.0 / static_cast<double>(draws));
      });
}

TEST_CASE("several draws are averaged", "[fisher_trace]") {
  Scene scene;
  constexpr std::int64_t count = 3;
  at::Generator from = generator(6);
  torch::Tensor expected = torch::zeros({}, torch::kFloat64);
  for (std::int64_t k = 0; k < count; ++k) {
    const torch::Tensor labels = microreg::Categorical{}.sample(scene.output(), from);
    const torch::Tensor loss = torch::cross_entropy_loss(scene.output(), labels);
    expected = expected + squared_norm_by_hand(loss, scene.model->parameters()) / static_cast<double>(count);
  }
  const microreg::FisherTrace<> penalty{.draws = count};
  scene.check(penalty, expected, [&](const torch::Tensor& output, const std::vector<torch::Tensor>& parameters) {
    return penalty(output, parameters, generator(6));
  });
}

TEST_CASE("the exact Fisher trace is the mean over every set of labels, and so is its gradient", "[fisher_trace]") {
  torch::manual_seed(2);
  torch::nn::Sequential model(torch::nn::Linear(2, 3), torch::nn::Tanh(), torch::nn::Linear(3, 3));
  model->to(torch::kFloat64);
  const auto parameters = model->parameters();
  const torch::Tensor x = torch::randn({3, 2}, torch::kFloat64);
  const torch::Tensor p = torch::softmax(model->forward(x), 1).detach();
  torch::Tensor expected = torch::zeros({}, torch::kFloat64);
  for (int code = 0; code < 27; ++code) {
    const torch::Tensor labels = helpers::tensor({code % 3, code / 3 % 3, code / 9}, torch::kInt64);
    const torch::Tensor probability = p.gather(1, labels.unsqueeze(1)).prod();
    expected =
        expected + probability * squared_norm_by_hand(torch::cross_entropy_loss(model->forward(x), labels), parameters);
  }
  const microreg::FisherTrace<> penalty{.expectation = Expectation::exact};
  const torch::Tensor value = penalty(model->forward(x), parameters);
  CHECK(relative_error(value, expected) < 1e-12);
  clear_grad(parameters);
  expected.backward();
  const torch::Tensor gradient = flat_grad(parameters);
  clear_grad(parameters);
  value.backward();
  CHECK(relative_error(flat_grad(parameters), gradient) < 1e-12);

  // Through Regularizer, with a loss of gradient zero.
  clear_grad(parameters);
  const auto zero_loss = [](const torch::Tensor& output, const torch::Tensor&) { return (output * 0).sum(); };
  microreg::Regularizer regularizer(model, zero_loss, penalty, {.micro_batch_size = 3});
  CHECK(relative_error(regularizer.backward(x, x).penalties[0].value, expected) < 1e-12);
  CHECK(relative_error(flat_grad(parameters), gradient) < 1e-12);
}

#if !defined(__clang__) || __clang_major__ >= 17
TEST_CASE("options of FisherTrace can be given without its distribution", "[fisher_trace]") {
  const microreg::FisherTrace averaged{.draws = 2};
  const microreg::FisherTrace expected{.expectation = Expectation::exact};
  const microreg::FisherTrace binary{.distribution = microreg::Bernoulli{}, .draws = 3};
  STATIC_REQUIRE(std::is_same_v<decltype(averaged), const microreg::FisherTrace<microreg::Categorical>>);
  STATIC_REQUIRE(std::is_same_v<decltype(expected), const microreg::FisherTrace<microreg::Categorical>>);
  STATIC_REQUIRE(std::is_same_v<decltype(binary), const microreg::FisherTrace<microreg::Bernoulli>>);
  CHECK(averaged.draws == 2);
  CHECK(expected.expectation == Expectation::exact);
  CHECK(binary.draws == 3);
}
#endif

TEST_CASE("the exact Fisher trace of a dense output counts each position as a sample", "[fisher_trace]") {
  torch::manual_seed(3);
  const torch::Tensor w = torch::randn({2, 3, 2}, torch::kFloat64).requires_grad_(true);  // logits [M, C, positions]
  const torch::Tensor rows = w.transpose(1, 2).reshape({4, 3});
  const microreg::FisherTrace<> penalty{.expectation = Expectation::exact};
  CHECK(relative_error(penalty(w * 1.0, {w}), penalty(rows, {w})) < 1e-12);
  // Each logit is a parameter: tr(F) / N = sum over positions and classes of p |e_c - p|^2 over N^2.
  const torch::Tensor p = torch::softmax(rows.detach(), 1);
  const double expected = (1 - p.square().sum(1)).sum().item<double>() / 16;
  CHECK(penalty(rows, {w}).item<double>() == Approx(expected).epsilon(1e-12));
}

TEST_CASE("the Fisher trace names what it cannot use", "[fisher_trace]") {
  check_refusals(microreg::FisherTrace{});
  const Tensor output = torch::ones({4, 5}).requires_grad_(true);
  CHECK(has(message_of<microreg::ModelError>([&] { (void)microreg::FisherTrace{}(output.select(1, 0), {output}); }),
            {"Categorical", "[4]", "Bernoulli"}));
  const auto of_option = [&](const auto& penalty) {
    return message_of<microreg::OptionError>([&] { (void)penalty(output, {output}); });
  };
  CHECK(has(of_option(microreg::FisherTrace<>{.draws = 0}), {"FisherTrace.draws", "0", "at least 1"}));
  CHECK(has(of_option(microreg::FisherTrace<microreg::Gaussian>{.expectation = Expectation::exact}),
            {"expectation", "Categorical", "draws"}));
}
