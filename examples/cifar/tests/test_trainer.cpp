#include "trainer.hpp"

#include <microreg/error.hpp>
#include <string>
#include <utility>
#include <vector>

#include "catch.hpp"
#include "evaluation.hpp"
#include "models.hpp"
#include "run_state.hpp"
#include "small_run.hpp"

namespace {

/// What a run ends with and what it has recorded.
std::pair<std::string, std::vector<Json>> outcome_of(const cifar::Options& options) {
  const std::string checksum = run(options).weights_checksum;
  return {checksum, timeless_metrics(options.output)};
}

}  // namespace

TEST_CASE("every method trains and leaves complete records") {
  const auto named = GENERATE(from_range(std::begin(cifar::method_names), std::end(cifar::method_names)));
  INFO(named.name);
  const TemporaryFolder folder;
  auto options = small_run(folder.path() / "run");
  if (named.value == cifar::Method::external_grafting) {
    auto recorded = small_run(folder.path() / "sgd");
    set_method(recorded, cifar::Method::sgd, "");
    run(recorded);
  }
  set_method(options, named.value, folder.path() / "sgd");
  options.model = GENERATE(cifar::Architecture::cnn, cifar::Architecture::resnet18);
  options.monitors = {cifar::Monitor::fisher_trace, cifar::Monitor::unit_jacobian};
  const auto summary = run(options);
  CHECK(summary.status == "completed");

  const auto lines = lines_of(folder.path() / "run" / "metrics.jsonl");
  REQUIRE(lines.size() == 3);
  std::vector<std::int64_t> steps;
  double best = 0;
  for (const Json& line : lines) {
    CHECK(line.size() == 9);
    steps.push_back(line.at("step").get<std::int64_t>());
    CHECK(line.at("train_loss").get<double>() > 0);
    for (const char* field : {"micro_batch_gradient_norm", "gradient_norm", "fisher_trace", "unit_jacobian"}) {
      CHECK(line.at(field).get<double>() > 0);
    }
    CHECK((line.at("penalty").get<double>() > 0) == cifar::has_penalty(named.value));
    CHECK(line.at("seconds").get<double>() > 0);
    best = std::max(best, line.at("test_accuracy").get<double>());
  }
  CHECK(steps == std::vector<std::int64_t>{4, 8, 10});

  const Json config = json_of(folder.path() / "run" / "config.json");
  CHECK(config.at("method") == named.name);
  CHECK(config.at("train_size") == 64);
  CHECK(config.at("device") == "cpu");
  CHECK(config.at("threads") == 1);
  CHECK(config.contains("microreg_version"));

  const Json written = json_of(folder.path() / "run" / "summary.json");
  CHECK(written.at("status") == "completed");
  CHECK(written.at("steps") == 10);
  CHECK(written.at("best_test_accuracy") == best);
  CHECK(written.at("final_test_accuracy") == lines.back().at("test_accuracy"));
  CHECK(written.at("test_accuracy") == best);  // The reference split: the best one was chosen on the test images.
  CHECK(written.at("weights_checksum").get<std::string>().size() == 16);
}

TEST_CASE("the same seed gives the same run, another seed another one") {
  const auto method = GENERATE(cifar::Method::sgd, cifar::Method::gradient_norm, cifar::Method::fisher_trace,
                               cifar::Method::average_jacobian, cifar::Method::unit_jacobian);
  INFO(cifar::name_of(cifar::method_names, method));
  const TemporaryFolder folder;
  const auto outcome = [&](const std::string& name, std::int64_t seed) {
    auto options = small_run(folder.path() / name);
    set_method(options, method, "");
    options.augment = true;
    options.seed = seed;
    return outcome_of(options);
  };
  const auto first = outcome("a", 2);
  CHECK(first == outcome("b", 2));
  CHECK(first.first != outcome("c", 3).first);
}

TEST_CASE("any number of workers gives the same run") {
  const TemporaryFolder folder;
  const auto outcome = [&](const char* name, std::int64_t workers) {
    auto options = small_run(folder.path() / name);
    set_method(options, cifar::Method::fisher_trace, "");  // draws labels
    options.model = cifar::Architecture::resnet18;         // moves statistics
    options.augment = true;
    options.workers = workers;
    return outcome_of(options);
  };
  const auto one = outcome("one", 1);
  CHECK(one == outcome("three", 3));
  CHECK(one == outcome("none", 0));  // with one thread
}

TEST_CASE("a run with and one without measuring end bitwise the same") {
  const TemporaryFolder folder;
  auto options = small_run(folder.path() / "measured");
  // Draws labels; with BatchNorm there are statistics to disturb as well.
  set_method(options, cifar::Method::fisher_trace, "");
  options.model = cifar::Architecture::resnet18;
  options.log_every = 1;
  options.monitors = {cifar::Monitor::fisher_trace, cifar::Monitor::average_jacobian, cifar::Monitor::unit_jacobian};
  options.monitor_on = GENERATE(cifar::MonitorOn::probe, cifar::MonitorOn::fresh);
  const auto measured = run(options);
  options.output = "";
  options.log_every = 1000;  // the last step only
  options.monitors.clear();
  CHECK(run(options).weights_checksum == measured.weights_checksum);

  const auto lines = lines_of(folder.path() / "measured" / "metrics.jsonl");
  CHECK(lines.size() == 10);
}

TEST_CASE("fresh images are other ones at every record, the probe is the same") {
  const TemporaryFolder folder;
  auto options = small_run(folder.path());
  options.train_size = 1000;
  options.learning_rate = 1e-30;  // Nothing moves: what differs are the images.
  options.log_every = 5;
  options.monitor_on = GENERATE(cifar::MonitorOn::probe, cifar::MonitorOn::fresh);
  run(options);
  const auto lines = lines_of(folder.path() / "metrics.jsonl");
  const bool same = lines.at(0).at("micro_batch_gradient_norm") == lines.at(1).at("micro_batch_gradient_norm");
  CHECK(same == (options.monitor_on == cifar::MonitorOn::probe));
}

TEST_CASE("the test images see the network that was best on the held-out ones") {
  const TemporaryFolder folder;
  auto options = small_run(folder.path() / "long");
  options.split = cifar::Split::holdout;
  options.validation_size = 100;
  options.test_size = 400;
  options.train_size = 200;
  options.learning_rate = 0.5;
  options.steps = 60;
  options.log_every = 1;
  const auto summary = run(options);
  CHECK(summary.best_step < 60);  // Otherwise the run shows nothing: choose another seed.
  for (const Json& line : lines_of(folder.path() / "long" / "metrics.jsonl")) {
    CHECK_FALSE(line.contains("test_accuracy"));
  }
  options.steps = summary.best_step;
  options.output = "";
  const auto stopped_there = run(options);
  CHECK(stopped_there.final_accuracy == summary.best_accuracy);
  CHECK(stopped_there.test_accuracy == summary.test_accuracy);
}

TEST_CASE("measuring leaves weights, statistics and mode alone, and averages squared norms") {
  torch::manual_seed(0);
  const auto model = cifar::make_resnet18({.classes = 10, .image_size = 16, .width = 4});
  const cifar::Images images{torch::randint(256, {12, 3, 16, 16}).to(torch::kUInt8), torch::randint(10, {12})};
  const cifar::Normalization normalization{{0.5, 0.5, 0.5}, {0.25, 0.25, 0.25}};
  const auto before = cifar::copies_of(*model);
  const double norm = cifar::measured_penalties(model, images, normalization, 6, /*workers=*/0).at(0);
  const double share = cifar::accuracy(*model, images, normalization);
  CHECK(model->is_training());
  const auto after = cifar::tensors_of(*model);
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
  CHECK_THAT(summary.at("message").get<std::string>(),
             Catch::Matchers::Contains("micro-batch") && Catch::Matchers::Contains("the last checkpoint is"));
  CHECK(summary.at("steps").get<int>() < 10);
}

TEST_CASE("an unknown device is refused") {
  auto options = small_run("");
  options.device = GENERATE("tpu", "cuda:99", "meta");
  CHECK_THROWS_AS(run(options), cifar::UsageError);
}
