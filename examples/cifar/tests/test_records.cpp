#include "records.hpp"

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
    cifar::Records records(folder, false);
    records.append({.step = 1});
    records.write_summary({.steps = 1});
  }
  CHECK_THROWS_WITH(cifar::Records(folder, false), Contains(folder.string()) && Contains("--overwrite"));
  CHECK(std::filesystem::file_size(folder / "metrics.jsonl") > 0);
  const cifar::Records replaced(folder, true);
  CHECK(std::filesystem::file_size(folder / "metrics.jsonl") == 0);
  CHECK_FALSE(std::filesystem::exists(folder / "summary.json"));
}

TEST_CASE("a folder that cannot be written to is reported at once") {
  const TemporaryFolder parent;
  std::ofstream(parent.path() / "file") << "in the way";
  CHECK_THROWS_WITH(cifar::Records(parent.path() / "file", false), Contains("file: cannot be written"));
  // /dev/full fails at the write, not at the opening, as a full disk does.
  std::filesystem::create_directories(parent.path() / "full");
  std::filesystem::create_symlink("/dev/full", parent.path() / "full" / "metrics.jsonl");
  cifar::Records records(parent.path() / "full", true);
  CHECK_THROWS_WITH(records.append({}), Contains("metrics.jsonl: cannot be written: No space left"));
}

TEST_CASE("without a folder nothing is written") {
  cifar::Records records("", false);
  records.write_config({}, "cpu", 1);
  records.append({});
  records.write_summary({});
  CHECK_FALSE(std::filesystem::exists("metrics.jsonl"));
}
