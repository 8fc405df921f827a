#include "checkpoint.hpp"

#include <fstream>
#include <string>

#include "atomic_file.hpp"
#include "catch.hpp"
#include "run_state.hpp"
#include "temporary_folder.hpp"

using Catch::Matchers::Contains;

namespace {

/// Turns over a bit in the middle of a file.
void damage(const std::filesystem::path& file) {
  std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
  const auto middle = static_cast<std::streamoff>(std::filesystem::file_size(file) / 2);
  stream.seekg(middle);
  const char byte = static_cast<char>(stream.get() ^ 1);
  stream.seekp(middle);
  stream.put(byte);
}

}  // namespace

TEST_CASE("the newest whole checkpoint is loaded, a damaged one is named and passed over") {
  const TemporaryFolder folder;
  const cifar::Checkpoints checkpoints(folder.path());
  std::vector<std::string> notes;
  CHECK_FALSE(checkpoints.load(notes).has_value());
  const std::string first(1000, '\0');
  const std::string second = "second\n" + std::string(500, 'x');
  checkpoints.save(5, first);
  CHECK(checkpoints.load(notes)->bytes == first);
  checkpoints.save(10, second);
  CHECK(checkpoints.load(notes)->bytes == second);
  CHECK(checkpoints.load(notes)->step == 10);
  CHECK(notes.empty());

  SECTION("a flipped bit") { damage(checkpoints.last()); }
  SECTION("cut short") { std::filesystem::resize_file(checkpoints.last(), 300); }
  SECTION("empty") { std::filesystem::resize_file(checkpoints.last(), 0); }
  SECTION("something else") { std::ofstream(checkpoints.last(), std::ios::trunc) << "not a checkpoint at all\n"; }
  const auto loaded = checkpoints.load(notes);
  CHECK(loaded->step == 5);
  CHECK(loaded->bytes == first);
  REQUIRE(notes.size() == 1);
  CHECK_THAT(notes.front(), Contains(checkpoints.last().string() + " is damaged") &&
                                Contains("going on from " + checkpoints.previous().string()));

  damage(checkpoints.previous());
  CHECK_THROWS_WITH(checkpoints.load(notes), Contains(checkpoints.last().string()) &&
                                                 Contains(checkpoints.previous().string() + " is damaged") &&
                                                 Contains("--overwrite"));
}

TEST_CASE("a checkpoint that was whole, but not yet in its place, counts") {
  const TemporaryFolder folder;
  const cifar::Checkpoints checkpoints(folder.path());
  std::vector<std::string> notes;
  checkpoints.save(5, "five");
  std::filesystem::rename(checkpoints.last(), checkpoints.next());  // killed between two renames
  CHECK(checkpoints.load(notes)->step == 5);
}

TEST_CASE("a full disk leaves the checkpoints that were there") {
  const TemporaryFolder folder;
  const cifar::Checkpoints checkpoints(folder.path());
  checkpoints.save(5, "five");
  std::filesystem::create_symlink("/dev/full", checkpoints.next().string() + ".tmp");
  CHECK_THROWS_WITH(checkpoints.save(10, "ten"), Contains("cannot be written: No space left"));
  std::vector<std::string> notes;
  CHECK(checkpoints.load(notes)->bytes == "five");
  CHECK(notes.empty());
}

TEST_CASE("a run's state comes back from its bytes, bit by bit") {
  const auto state_of = [](std::uint64_t seed) {
    torch::manual_seed(seed);
    cifar::RunState state;
    state.model = cifar::make_resnet18({.classes = 10, .image_size = 16, .width = 4});
    for (const torch::Tensor& buffer : state.model->buffers()) {
      buffer.add_(static_cast<std::int64_t>(seed));
    }
    state.optimizer = std::make_shared<torch::optim::SGD>(state.model->parameters(), 0.1);
    state.step = static_cast<std::int64_t>(seed);
    state.best = cifar::copies_of(*state.model);
    state.best[0].add_(1);
    state.summary.best_accuracy = 0.1 * static_cast<double>(seed);
    state.summary.best_step = 3;
    state.loss.add(torch::randn({}));
    state.metrics_bytes = 99;
    return state;
  };
  const auto saved = state_of(2);
  auto restored = state_of(5);
  restored.penalty.add(torch::ones({}));
  const std::string bytes = cifar::serialized(saved, "{\"a\": 1}");
  cifar::restore(restored, bytes);
  CHECK(cifar::config_in(bytes) == "{\"a\": 1}");
  CHECK(restored.step == 2);
  CHECK(restored.summary.best_accuracy == saved.summary.best_accuracy);
  CHECK(restored.summary.best_step == 3);
  CHECK(restored.metrics_bytes == 99);
  CHECK(restored.loss.count == 1);
  CHECK(torch::equal(restored.loss.sum, saved.loss.sum));
  CHECK(restored.penalty.count == 0);
  CHECK_FALSE(restored.penalty.sum.defined());
  const auto expected = cifar::tensors_of(*saved.model);
  REQUIRE(restored.best.size() == expected.size());
  CHECK(torch::equal(restored.best[0], expected[0] + 1));
  CHECK(torch::equal(restored.best[1], expected[1]));
  const auto tensors = cifar::tensors_of(*restored.model);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    CHECK(torch::equal(tensors[i], expected[i]));
  }
}

TEST_CASE("what is no state of the run's model is refused, and changes nothing") {
  const auto state_of = [](std::int64_t width) {
    cifar::RunState state;
    state.model = cifar::make_cnn({.classes = 10, .image_size = 16, .width = width});
    state.optimizer = std::make_shared<torch::optim::SGD>(state.model->parameters(), 0.1);
    return state;
  };
  auto state = state_of(4);
  const auto before = cifar::copies_of(*state.model);
  std::string bytes = cifar::serialized(state_of(6), "{}");
  std::string message = "tensor 0 of model is not like that of the network";
  SECTION("a network of another width") {}
  SECTION("a negative count") {
    state.step = -1;
    bytes = cifar::serialized(state, "{}");
    state.step = 0;
    message = "step is -1; it must be at least 0";
  }
  SECTION("the best weights of another network") {
    state.best = {torch::ones({1})};
    bytes = cifar::serialized(state, "{}");
    state.best = {};
    message = "best has 1 tensors";
  }
  SECTION("a part of it") {
    bytes.resize(bytes.size() / 2);
    message = "the checkpoint's contents are not those of this run";
    CHECK_THROWS_AS(cifar::config_in(bytes), cifar::CheckpointError);
  }
  CHECK_THROWS_WITH(cifar::restore(state, bytes), Contains(message) && Contains("--overwrite"));
  const auto after = cifar::tensors_of(*state.model);
  for (std::size_t i = 0; i < before.size(); ++i) {
    CHECK(torch::equal(after[i], before[i]));
  }
  CHECK(state.step == 0);
}
