#include "checkpoint.hpp"

#include <cstdio>

#include "catch.hpp"
#include "small_run.hpp"

using Catch::Matchers::Contains;

namespace {

/// Trains and returns what it said.
std::string output_of(const cifar::Options& options) {
  std::FILE* stream = std::tmpfile();
  REQUIRE(stream != nullptr);
  cifar::Progress progress(stream);
  cifar::train(options, progress);
  std::string text(static_cast<std::size_t>(std::ftell(stream)), '\0');
  std::rewind(stream);
  text.resize(std::fread(text.data(), 1, text.size(), stream));
  std::fclose(stream);
  return text;
}

cifar::Options checkpointed(const std::filesystem::path& output) {
  auto options = small_run(output);
  set_method(options, cifar::Method::unit_jacobian, "");
  options.augment = true;
  options.model = cifar::Architecture::resnet18;
  options.checkpoint_every = 3;
  return options;
}

}  // namespace

TEST_CASE("a run goes on from a damaged checkpoint's predecessor, bitwise") {
  const TemporaryFolder folder;
  auto options = checkpointed(folder.path() / "a");
  const auto alone = run(options);
  const auto metrics = timeless_metrics(folder.path() / "a");
  REQUIRE(metrics.size() == 3);

  const cifar::Checkpoints checkpoints(folder.path() / "a");
  std::filesystem::resize_file(checkpoints.last(), std::filesystem::file_size(checkpoints.last()) - 1);
  options.resume = true;
  const std::string said = output_of(options);
  CHECK_THAT(said, Contains("checkpoint.ckpt is damaged") && Contains("resumed from step 9"));
  CHECK(json_of(folder.path() / "a" / "summary.json").at("weights_checksum") == alone.weights_checksum);
  CHECK(timeless_metrics(folder.path() / "a") == metrics);
}

TEST_CASE("a run is prolonged, with any number of workers, and ends as the longer one") {
  const TemporaryFolder folder;
  auto options = checkpointed(folder.path() / "a");
  options.log_every = 5;
  options.steps = 20;
  options.workers = 1;
  const auto whole = run(options);
  options.output = (folder.path() / "b").string();
  options.steps = 10;
  run(options);
  options.steps = 20;
  options.workers = GENERATE(1, 3);
  options.resume = true;
  CHECK(run(options).weights_checksum == whole.weights_checksum);
  CHECK(timeless_metrics(folder.path() / "b") == timeless_metrics(folder.path() / "a"));
}

TEST_CASE("another run's checkpoints go with its records") {
  const TemporaryFolder folder;
  auto options = checkpointed(folder.path());
  run(options);
  options.overwrite = true;
  options.seed = 7;
  options.checkpoint_every = 0;
  run(options);
  const cifar::Checkpoints checkpoints(folder.path());
  std::filesystem::remove(checkpoints.last());
  std::vector<std::string> notes;
  CHECK(checkpoints.load(notes)->step == 0);  // the one before the first step, not the other run's
}

TEST_CASE("other options, and a folder without a checkpoint") {
  const TemporaryFolder folder;
  auto options = checkpointed(folder.path() / "a");
  options.resume = true;
  CHECK_THAT(output_of(options), Contains("there is no checkpoint in") && Contains("completed after 10 steps"));
  const auto metrics = timeless_metrics(folder.path() / "a");
  options.learning_rate = 0.25;
  CHECK_THROWS_WITH(run(options), Contains("learning_rate is 0.25, but 0.1"));
  CHECK(timeless_metrics(folder.path() / "a") == metrics);  // Nothing was lost.
}

TEST_CASE("a folder without room for a checkpoint is reported before the first step") {
  const TemporaryFolder folder;
  auto options = checkpointed(folder.path() / "a");
  std::filesystem::create_directories(folder.path() / "a");
  std::filesystem::create_symlink("/dev/full", folder.path() / "a" / "checkpoint.next.ckpt.tmp");
  CHECK_THROWS_WITH(run(options), Contains("checkpoint.next.ckpt.tmp: cannot be written: No space left"));
  CHECK(lines_of(folder.path() / "a" / "metrics.jsonl").empty());
}
