#include "trainer.hpp"

#include <microreg/error.hpp>
#include <nlohmann/json.hpp>
#include <vector>

#include "catch.hpp"
#include "evaluation.hpp"
#include "methods.hpp"
#include "models.hpp"
#include "temporary_folder.hpp"

namespace {

using Json = nlohmann::json;

cifar::Options small_run(const std::filesystem::path& output) {
  return {.train_size = 64,
          .test_size = 50,
          .image_size = 16,
          .width = 4,
          .batch_size = 32,
          .micro_batch_size = 8,
          .steps = 10,
          .seed = 2,
          .device = "cpu",
          .threads = 1,
          .log_every = 4,
          .output = output.string()};
}

cifar::Summary run(const cifar::Options& options) {
  cifar::Progress silent(nullptr);
  return cifar::train(options, silent);
}

Json json_of(const std::filesystem::path& file) { return Json::parse(std::ifstream(file)); }

std::vector<Json> lines_of(const std::filesystem::path& file) {
  std::vector<Json> lines;
  std::ifstream stream(file);
  for (std::string line; std::getline(stream, line);) {
    lines.push_back(Json::parse(line));
  }
  return lines;
}

std::vector<Json> without_seconds(std::vector<Json> lines) {
  for (Json& line : lines) {
    line.erase("seconds");
  }
  return lines;
}

std::vector<torch::Tensor> values_of(const torch::nn::Module& model) {
  std::vector<torch::Tensor> values;
  for (const auto& tensor : model.parameters()) {
    values.push_back(tensor.detach().clone());
  }
  for (const auto& tensor : model.buffers()) {
    values.push_back(tensor.clone());
  }
  return values;
}

}  // namespace

TEST_CASE("every method trains and leaves complete records") {
  const auto named = GENERATE(from_range(std::begin(cifar::method_names), std::end(cifar::method_names)));
  INFO(named.name);
  const TemporaryFolder folder;
  auto options = small_run(folder.path());
  options.method = named.value;
  options.strength = cifar::default_strength(named.value);
  options.model = GENERATE(cifar::Architecture::cnn, cifar::Architecture::resnet18);
  const auto summary = run(options);
  CHECK(summary.status == "completed");

  const auto lines = lines_of(folder.path() / "metrics.jsonl");
  REQUIRE(lines.size() == 3);
  std::vector<std::int64_t> steps;
  double best = 0;
  for (const Json& line : lines) {
    CHECK(line.size() == 6);
    steps.push_back(line.at("step").get<std::int64_t>());
    CHECK(line.at("train_loss").get<double>() > 0);
    CHECK(line.at("micro_batch_gradient_norm").get<double>() > 0);
    CHECK((line.at("penalty").get<double>() > 0) == cifar::has_penalty(named.value));
    CHECK(line.at("seconds").get<double>() > 0);
    best = std::max(best, line.at("test_accuracy").get<double>());
  }
  CHECK(steps == std::vector<std::int64_t>{4, 8, 10});

  const Json config = json_of(folder.path() / "config.json");
  CHECK(config.at("method") == named.name);
  CHECK(config.at("train_size") == 64);
  CHECK(config.at("device") == "cpu");
  CHECK(config.at("threads") == 1);
  CHECK(config.contains("microreg_version"));

  const Json written = json_of(folder.path() / "summary.json");
  CHECK(written.at("status") == "completed");
  CHECK(written.at("steps") == 10);
  CHECK(written.at("best_test_accuracy") == best);
  CHECK(written.at("final_test_accuracy") == lines.back().at("test_accuracy"));
}

TEST_CASE("the same seed gives the same run, another seed another one") {
  const auto named = GENERATE(from_range(std::begin(cifar::method_names), std::end(cifar::method_names)));
  INFO(named.name);
  const TemporaryFolder folder;
  const auto metrics = [&](const std::string& name, std::int64_t seed) {
    auto options = small_run(folder.path() / name);
    options.method = named.value;
    options.strength = cifar::default_strength(named.value);
    options.augment = true;
    options.seed = seed;
    run(options);
    return without_seconds(lines_of(folder.path() / name / "metrics.jsonl"));
  };
  const auto first = metrics("a", 2);
  CHECK(first == metrics("b", 2));
  CHECK(first != metrics("c", 3));
}

TEST_CASE("logging more often does not change the run") {
  const TemporaryFolder folder;
  auto options = small_run(folder.path() / "often");
  options.method =
      cifar::Method::fisher_trace;  // Draws labels; with BatchNorm there are statistics to disturb as well.
  options.model = cifar::Architecture::resnet18;
  options.log_every = 1;
  const double often = (run(options), lines_of(folder.path() / "often" / "metrics.jsonl").back())
                           .at("micro_batch_gradient_norm")
                           .get<double>();
  options.log_every = 10;
  options.output = (folder.path() / "once").string();
  run(options);
  const Json once = lines_of(folder.path() / "once" / "metrics.jsonl").back();
  CHECK(once.at("micro_batch_gradient_norm").get<double>() == often);
}

TEST_CASE("plain methods take the step of SGD on the mean loss of the whole batch") {
  torch::manual_seed(0);
  const auto model = cifar::make_cnn({.classes = 3, .image_size = 16, .width = 4});
  const torch::Tensor images = torch::randn({20, 3, 16, 16});
  const torch::Tensor labels = torch::randint(3, {20});
  const auto before = values_of(*model);
  const auto gradients =
      torch::autograd::grad({torch::cross_entropy_loss(model->forward(images), labels)}, model->parameters());
  const auto step =
      cifar::make_step(cifar::Method::large_batch, model, std::make_shared<torch::optim::SGD>(model->parameters(), 0.5),
                       {.strength = 0, .micro_batch_size = 8});
  (void)step(images, labels);
  const auto after = values_of(*model);
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    CHECK(torch::allclose(after[i], before[i] - 0.5 * gradients[i], 1e-5, 1e-6));
  }
}

TEST_CASE("measuring leaves weights, statistics and mode alone, and averages squared norms") {
  torch::manual_seed(0);
  const auto model = cifar::make_resnet18({.classes = 10, .image_size = 16, .width = 4});
  const cifar::Images images{torch::randint(256, {12, 3, 16, 16}).to(torch::kUInt8), torch::randint(10, {12})};
  const cifar::Normalization normalization{{0.5, 0.5, 0.5}, {0.25, 0.25, 0.25}};
  const auto before = values_of(*model);
  const double norm = cifar::micro_batch_gradient_norm(model, images, normalization, 6);
  const double share = cifar::accuracy(*model, images, normalization);
  CHECK(model->is_training());
  const auto after = values_of(*model);
  for (std::size_t i = 0; i < before.size(); ++i) {
    CHECK(torch::equal(before[i], after[i]));
  }

  const torch::Tensor input = cifar::normalized(images.pixels, normalization);
  double expected = 0;
  for (const std::int64_t begin : {0, 6}) {
    const auto loss =
        torch::cross_entropy_loss(model->forward(input.narrow(0, begin, 6)), images.labels.narrow(0, begin, 6));
    for (const auto& gradient : torch::autograd::grad({loss}, model->parameters())) {
      expected += gradient.square().sum().item<double>() / 2;
    }
  }
  CHECK(norm == Approx(expected).epsilon(1e-4));
  CHECK(share * 12 == Approx(std::round(share * 12)));
}

TEST_CASE("a run that diverges stops, names step and micro-batch, and leaves a summary") {
  const TemporaryFolder folder;
  auto options = small_run(folder.path());
  options.learning_rate = 1e30;
  CHECK_THROWS_WITH(run(options), Catch::Matchers::Contains("micro-batch") && Catch::Matchers::Contains("at step"));
  const Json summary = json_of(folder.path() / "summary.json");
  CHECK(summary.at("status") == "diverged");
  CHECK(summary.at("message").get<std::string>().find("micro-batch") != std::string::npos);
  CHECK(summary.at("steps").get<int>() < 10);
}

TEST_CASE("an unknown device is refused") {
  auto options = small_run("");
  options.device = GENERATE("tpu", "cuda:99", "meta");
  CHECK_THROWS_AS(run(options), cifar::UsageError);
}
