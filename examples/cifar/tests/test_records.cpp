#include "records.hpp"

#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include "catch.hpp"
#include "temporary_folder.hpp"

using Catch::Matchers::Contains;

TEST_CASE("records of another run are kept, unless told otherwise") {
  const TemporaryFolder parent;
  const auto folder = parent.path() / "a" / "run";
  {
    cifar::Records records({.output = folder.string()});
    records.append({.step = 1});
    records.write_summary({.steps = 1});
  }
  CHECK_THROWS_WITH(cifar::Records({.output = folder.string()}),
                    Contains(folder.string()) && Contains("--overwrite") && Contains("--resume"));
  CHECK(std::filesystem::file_size(folder / "metrics.jsonl") > 0);
  const cifar::Records replaced({.output = folder.string(), .overwrite = true});
  CHECK(std::filesystem::file_size(folder / "metrics.jsonl") == 0);
  replaced.begin("{}");
  CHECK_FALSE(std::filesystem::exists(folder / "summary.json"));
}

TEST_CASE("a folder that cannot be written to is reported at once") {
  const TemporaryFolder parent;
  std::ofstream(parent.path() / "file") << "in the way";
  CHECK_THROWS_WITH(cifar::Records({.output = (parent.path() / "file").string()}), Contains("file: cannot be written"));
  // /dev/full fails at the write, not at the opening, as a full disk does.
  std::filesystem::create_directories(parent.path() / "full");
  std::filesystem::create_symlink("/dev/full", parent.path() / "full" / "metrics.jsonl");
  cifar::Records records({.output = (parent.path() / "full").string(), .overwrite = true});
  CHECK_THROWS_WITH(records.append({}), Contains("metrics.jsonl: cannot be written: No space left"));
}

TEST_CASE("without a folder nothing is written") {
  cifar::Records records({});
  records.begin(cifar::Records::config({}, "cpu", 1));
  records.append({});
  records.write_summary({});
  CHECK_FALSE(std::filesystem::exists("metrics.jsonl"));
}

TEST_CASE("accuracies go by the name of the images that they are of") {
  const TemporaryFolder folder;
  const auto [split, name] = GENERATE(table<cifar::Split, std::string>(
      {{cifar::Split::holdout, "validation_accuracy"}, {cifar::Split::reference, "test_accuracy"}}));
  cifar::Records records({.split = split, .output = folder.path().string()});
  records.append({.accuracy = 0.5, .monitors = {{"fisher_trace", 2.0}}});
  records.write_summary({.best_accuracy = 0.75, .final_accuracy = 0.25, .test_accuracy = 0.125});
  const auto line = nlohmann::json::parse(std::ifstream(folder.path() / "metrics.jsonl"));
  CHECK(line.at(name) == 0.5);
  CHECK(line.at("fisher_trace") == 2.0);
  CHECK(line.size() == 8);
  const auto summary = nlohmann::json::parse(std::ifstream(folder.path() / "summary.json"));
  CHECK(summary.at(fmt::format("best_{}", name)) == 0.75);
  CHECK(summary.at(fmt::format("final_{}", name)) == 0.25);
  CHECK(summary.at("test_accuracy") == 0.125);
}

TEST_CASE("records are rewound to a checkpoint, and not beyond what is there") {
  const TemporaryFolder folder;
  cifar::Records records({.output = folder.path().string()});
  records.append({.step = 1});
  const std::int64_t bytes = records.sync();
  records.append({.step = 2});
  cifar::Records resumed({.output = folder.path().string(), .resume = true});
  resumed.rewind(bytes);
  resumed.append({.step = 3});
  std::ifstream stream(folder.path() / "metrics.jsonl");
  std::vector<std::int64_t> steps;
  for (std::string line; std::getline(stream, line);) {
    steps.push_back(nlohmann::json::parse(line).at("step").get<std::int64_t>());
  }
  CHECK(steps == std::vector<std::int64_t>{1, 3});
  CHECK_THROWS_WITH(resumed.rewind(100000), Contains("but 100000 when the checkpoint was written"));
}

TEST_CASE("a run goes on with the same options only") {
  const auto config = [](const cifar::Options& options) { return cifar::Records::config(options, "cpu", 1); };
  cifar::Options options{.steps = 10, .output = "a"};
  const std::string saved = config(options);
  options.output = "b";
  options.steps = 20;
  CHECK_NOTHROW(cifar::check_same_run(saved, config(options), options));
  options.schedule = cifar::Schedule::cosine;  // whose learning rate depends on the number of steps
  CHECK_THROWS_WITH(cifar::check_same_run(saved, config(options), options), Contains("schedule is \"cosine\""));
  options.schedule = cifar::Schedule::constant;
  options.steps = 5;
  CHECK_THROWS_WITH(cifar::check_same_run(saved, config(options), options), Contains("steps is 5, but 10"));
  options.steps = 10;
  options.workers = 2;  // not the same bits as without, -1, which may be none
  CHECK_THROWS_WITH(cifar::check_same_run(saved, config(options), options), Contains("workers is 2, but -1"));
  options.workers = -1;
  options.learning_rate = 0.25;
  CHECK_THROWS_WITH(cifar::check_same_run(saved, config(options), options),
                    Contains("learning_rate is 0.25, but 0.1") && Contains("--overwrite"));
  const std::string damaged =
      GENERATE(as<std::string>(), "{\"steps\": ", "{\"steps\": " + std::string(20, '[') + std::string(20, ']') + "}");
  CHECK_THROWS_AS(cifar::check_same_run(damaged, config(options), options), cifar::UsageError);
  CHECK_THROWS_WITH(cifar::check_same_run(damaged, config(options), options), Contains("cannot be read"));
}
