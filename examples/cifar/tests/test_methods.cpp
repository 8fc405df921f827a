#include "methods.hpp"

#include <fstream>
#include <vector>

#include "catch.hpp"
#include "data.hpp"
#include "recorded_norms.hpp"
#include "run_state.hpp"
#include "temporary_folder.hpp"

namespace {

/// A step of a method on a small network, and what autograd says of the plain one.
struct Stepped {
  std::vector<torch::Tensor> moved;     // weights before minus weights after
  std::vector<torch::Tensor> gradient;  // of the mean loss of the whole batch
  std::vector<torch::Tensor> micro_batch_gradient;
};

Stepped step_of(const cifar::Options& options, std::int64_t number = 0) {
  torch::manual_seed(0);
  const auto model = cifar::make_cnn({.classes = 3, .image_size = 16, .width = 4});
  const torch::Tensor images = torch::randn({20, 3, 16, 16});
  const torch::Tensor labels = torch::randint(3, {20});
  const auto gradient = [&](std::int64_t count) {
    return torch::autograd::grad(
        {torch::cross_entropy_loss(model->forward(images.narrow(0, 0, count)), labels.narrow(0, 0, count))},
        model->parameters());
  };
  Stepped result{.moved = {}, .gradient = gradient(20), .micro_batch_gradient = gradient(8)};
  for (const torch::Tensor& parameter : model->parameters()) {
    result.moved.push_back(parameter.detach().clone());
  }
  cifar::Step step(options, model, std::make_shared<torch::optim::SGD>(model->parameters(), options.learning_rate));
  (void)step(number, images, labels);
  for (std::size_t i = 0; i < result.moved.size(); ++i) {
    result.moved[i] -= model->parameters()[i].detach();
  }
  return result;
}

double norm_of(const std::vector<torch::Tensor>& tensors) {
  double sum = 0;
  for (const torch::Tensor& tensor : tensors) {
    sum += tensor.square().sum().item<double>();
  }
  return std::sqrt(sum);
}

void check_moved(const Stepped& stepped, double factor) {
  for (std::size_t i = 0; i < stepped.moved.size(); ++i) {
    CHECK(torch::allclose(stepped.moved[i], factor * stepped.gradient[i], 1e-3, 1e-6));
  }
}

cifar::Options options_of(cifar::Method method) {
  return {.method = method, .strength = 0, .micro_batch_size = 8, .learning_rate = 0.5};
}

}  // namespace

TEST_CASE("plain methods take the step of SGD on the mean loss of the whole batch") {
  check_moved(step_of(options_of(cifar::Method::large_batch)), 0.5);
}

TEST_CASE("the learning rate is that of the schedule") {
  auto options = options_of(cifar::Method::large_batch);
  options.steps = 2;
  options.schedule = cifar::Schedule::drops;
  check_moved(step_of(options), 0.5);
  check_moved(step_of(options, 1), 0.05);
}

TEST_CASE("grafting takes the whole batch's direction with another norm") {
  const auto iterative = step_of(options_of(cifar::Method::iterative_grafting));
  check_moved(iterative, 0.5 * norm_of(iterative.micro_batch_gradient) / norm_of(iterative.gradient));

  const auto normalized = step_of(options_of(cifar::Method::normalized));
  CHECK(norm_of(normalized.moved) == Approx(0.5).epsilon(1e-4));
  check_moved(normalized, 0.5 / norm_of(normalized.gradient));

  const TemporaryFolder folder;
  std::ofstream(folder.path() / "metrics.jsonl") << R"({"step": 10, "gradient_norm": 3.0})";
  auto options = options_of(cifar::Method::external_grafting);
  options.norms_from = folder.path().string();
  CHECK(norm_of(step_of(options).moved) == Approx(1.5).epsilon(1e-4));
}

TEST_CASE("recorded norms hold from record to record, and the last one beyond") {
  const TemporaryFolder folder;
  std::ofstream(folder.path() / "metrics.jsonl") << "{\"step\": 10, \"gradient_norm\": 3.0}\n"
                                                 << "{\"step\": 20, \"gradient_norm\": 2.0}\n";
  const cifar::RecordedNorms norms(folder.path());
  CHECK(norms.steps() == 20);
  CHECK(norms.at(0) == 3);
  CHECK(norms.at(9) == 3);
  CHECK(norms.at(10) == 2);
  CHECK(norms.at(19) == 2);
  CHECK(norms.at(500) == 2);
}

TEST_CASE("records without norms are refused by file and line") {
  const TemporaryFolder folder;
  using Catch::Matchers::Contains;
  CHECK_THROWS_WITH(cifar::RecordedNorms(folder.path()), Contains("metrics.jsonl: cannot be read"));
  const std::string line = GENERATE(as<std::string>(), "{\"step\": 10, \"gradient_n", "{\"step\": 10}", "[]",
                                    "{\"step\": 10, \"gradient_norm\": null}",
                                    "{\"step\": 10, \"gradient_norm\": \"a\"}", "{\"step\": 10, \"gradient_norm\": -1}",
                                    "{\"step\": 1e300, \"gradient_norm\": 1}", "{\"step\": -1, \"gradient_norm\": 1}",
                                    "{\"step\": " + std::string(20, '[') + std::string(20, ']') + "}");
  std::ofstream(folder.path() / "metrics.jsonl") << "{\"step\": 5, \"gradient_norm\": 1.0}\n" << line << "\n";
  CHECK_THROWS_WITH(cifar::RecordedNorms(folder.path()), Contains("metrics.jsonl: line 2"));
}
