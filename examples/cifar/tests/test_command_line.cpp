#include "command_line.hpp"

#include <initializer_list>
#include <vector>

#include "catch.hpp"

namespace {

cifar::Options parse(std::initializer_list<const char*> arguments) {
  std::vector<const char*> argv{"microreg_cifar"};
  argv.insert(argv.end(), arguments);
  return cifar::parse_command_line(static_cast<int>(argv.size()), argv.data()).value();
}

using Catch::Matchers::Contains;

}  // namespace

TEST_CASE("defaults follow the method") {
  CHECK(parse({"--method", "sgd"}).batch_size == 32);
  CHECK(parse({"--method", "sgd", "--micro-batch-size", "64"}).batch_size == 64);
  CHECK(parse({"--method", "sgd", "--batch-size", "100"}).batch_size == 100);
  CHECK(parse({"--method", "large-batch"}).batch_size == 512);
  CHECK(parse({"--method", "large-batch"}).strength == 0);
  CHECK(parse({"--method", "gradient-norm"}).strength == 0.01);
  CHECK(parse({"--method", "fisher-trace"}).strength == 0.01);
  CHECK(parse({"--method", "average-jacobian"}).strength == 0.001);
  CHECK(parse({"--method", "unit-jacobian"}).strength == 0.001);
  CHECK(parse({"--method", "unit-jacobian", "--strength", "0.5"}).strength == 0.5);
  CHECK(parse({"--method", "normalized"}).strength == 0);
  CHECK(parse({"--data", "synthetic"}).split == cifar::Split::reference);
  CHECK(parse({"--data", "folder"}).split == cifar::Split::holdout);
}

TEST_CASE("every option reaches its field") {
  const auto options = parse({"--data",
                              "folder",
                              "--dataset",
                              "cifar100",
                              "--model",
                              "resnet18",
                              "--method",
                              "fisher-trace",
                              "--batch-size",
                              "256",
                              "--micro-batch-size",
                              "64",
                              "--learning-rate",
                              "0.25",
                              "--strength",
                              "0.125",
                              "--steps",
                              "7",
                              "--seed",
                              "3",
                              "--device",
                              "cpu",
                              "--train-size",
                              "1000",
                              "--test-size",
                              "500",
                              "--image-size",
                              "16",
                              "--augment",
                              "--log-every",
                              "2",
                              "--output",
                              "runs/a",
                              "--threads",
                              "1",
                              "--workers",
                              "3",
                              "--overwrite",
                              "--split",
                              "reference",
                              "--validation-size",
                              "300",
                              "--width",
                              "8",
                              "--warm-up",
                              "50",
                              "--estimator",
                              "central-frozen",
                              "--micro-batch-share",
                              "0.25",
                              "--every",
                              "4",
                              "--weighting",
                              "reference",
                              "--schedule",
                              "cosine",
                              "--layout",
                              "channels-last",
                              "--monitor",
                              "unit-jacobian,fisher-trace",
                              "--monitor-on",
                              "fresh",
                              "--checkpoint-every",
                              "20"});
  CHECK(options.data == "folder");
  CHECK(options.dataset == cifar::DatasetName::cifar100);
  CHECK(options.model == cifar::Architecture::resnet18);
  CHECK(options.method == cifar::Method::fisher_trace);
  CHECK(options.batch_size == 256);
  CHECK(options.micro_batch_size == 64);
  CHECK(options.learning_rate == 0.25);
  CHECK(options.strength == 0.125);
  CHECK(options.steps == 7);
  CHECK(options.seed == 3);
  CHECK(options.device == "cpu");
  CHECK(options.train_size == 1000);
  CHECK(options.test_size == 500);
  CHECK(options.image_size == 16);
  CHECK(options.augment);
  CHECK(options.log_every == 2);
  CHECK(options.output == "runs/a");
  CHECK(options.threads == 1);
  CHECK(options.workers == 3);
  CHECK(options.overwrite);
  CHECK(options.split == cifar::Split::reference);
  CHECK(options.validation_size == 300);
  CHECK(options.width == 8);
  CHECK(options.warm_up == 50);
  CHECK(options.estimator == cifar::EstimatorName::central_frozen);
  CHECK(options.micro_batch_share == 0.25);
  CHECK(options.every == 4);
  CHECK(options.weighting == cifar::WeightingName::reference);
  CHECK(options.schedule == cifar::Schedule::cosine);
  CHECK(options.layout == cifar::Layout::channels_last);
  CHECK((options.monitors == std::vector{cifar::Monitor::unit_jacobian, cifar::Monitor::fisher_trace}));
  CHECK(options.monitor_on == cifar::MonitorOn::fresh);
  CHECK(options.checkpoint_every == 20);
  const auto grafting =
      parse({"--method", "external-grafting", "--norms-from", "runs/sgd", "--output", "o", "--resume"});
  CHECK(grafting.norms_from == "runs/sgd");
  CHECK(grafting.resume);
  CHECK_FALSE(parse({"--no-augment"}).augment);
}

TEST_CASE("requests that cannot be run are refused by name") {
  CHECK_THROWS_WITH(parse({"--batch-size", "0"}), Contains("--batch-size is 0; it must be at least 1"));
  CHECK_THROWS_WITH(parse({"--micro-batch-size", "-4"}), Contains("--micro-batch-size is -4"));
  CHECK_THROWS_WITH(parse({"--learning-rate", "nan"}), Contains("--learning-rate is nan"));
  CHECK_THROWS_WITH(parse({"--strength", "-1"}), Contains("--strength is -1"));
  CHECK_THROWS_WITH(parse({"--method", "sgd", "--strength", "0.1"}), Contains("--method sgd has no penalty"));
  CHECK_THROWS_WITH(parse({"--dataset", "cifar100"}), Contains("--dataset cifar100 needs --data DIR"));
  CHECK_THROWS_WITH(parse({"--method", "adam"}), Contains("--method") && Contains("adam"));
  CHECK_THROWS_WITH(parse({"--method", "external-grafting"}), Contains("--norms-from"));
  CHECK_THROWS_WITH(parse({"--norms-from", "runs/sgd"}), Contains("--norms-from is for --method external-grafting"));
  CHECK_THROWS_WITH(parse({"--micro-batch-share", "0"}), Contains("--micro-batch-share is 0"));
  CHECK_THROWS_WITH(parse({"--every", "0"}), Contains("--every is 0"));
  CHECK_THROWS_WITH(parse({"--resume"}), Contains("--resume needs --output"));
  CHECK_THROWS_WITH(parse({"--resume", "--overwrite", "--output", "o"}), Contains("exclude each other"));
  CHECK_THROWS_WITH(parse({"--monitor", "loss"}), Contains("--monitor") && Contains("loss"));
  CHECK_THROWS_WITH(parse({"--image-size", "24"}), Contains("--image-size"));
  CHECK_THROWS_WITH(parse({"--steps", "many"}), Contains("--steps"));
  CHECK_THROWS_AS(parse({"--unknown"}), cifar::UsageError);
  CHECK_THROWS_WITH(parse({"--steps", "3", ""}), Contains("an argument is empty"));
}

TEST_CASE("workers are as many as threads where a step has several micro-batches, on the CPU") {
  cifar::Options options{.batch_size = 64, .micro_batch_size = 32};
  const auto workers = [&](bool on_cpu) { return cifar::resolved_workers(options, on_cpu, /*threads=*/5); };
  CHECK(workers(true) == 5);
  CHECK(workers(false) == 0);
  options.micro_batch_size = 64;
  CHECK(workers(true) == 0);
  options.workers = GENERATE(0, 3);
  CHECK(workers(true) == options.workers);
  CHECK(workers(false) == options.workers);
}

TEST_CASE("learning rate schedules") {
  cifar::Options options{.learning_rate = 0.4, .steps = 100};
  CHECK(cifar::learning_rate_at(options, 99) == 0.4);
  options.schedule = cifar::Schedule::cosine;
  CHECK(cifar::learning_rate_at(options, 0) == 0.4);
  CHECK(cifar::learning_rate_at(options, 50) == Approx(0.2));
  CHECK(cifar::learning_rate_at(options, 99) < 0.001);
  options.schedule = cifar::Schedule::drops;
  CHECK(cifar::learning_rate_at(options, 49) == 0.4);
  CHECK(cifar::learning_rate_at(options, 50) == Approx(0.04));
  CHECK(cifar::learning_rate_at(options, 75) == Approx(0.004));
}
