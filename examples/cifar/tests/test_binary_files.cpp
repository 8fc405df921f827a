#include "binary_files.hpp"

#include <fstream>

#include "catch.hpp"
#include "temporary_folder.hpp"

namespace {

constexpr int pixel_bytes = 3072;

/// Byte `i` of the pixels of image `image`.
std::uint8_t pixel(int image, int i) { return static_cast<std::uint8_t>((37 * image + 11 * i + i / 256) % 256); }

std::string record(const std::string& labels, int image) {
  std::string bytes = labels;
  for (int i = 0; i < pixel_bytes; ++i) {
    bytes += static_cast<char>(pixel(image, i));
  }
  return bytes;
}

void write(const std::filesystem::path& file, const std::string& bytes) {
  std::filesystem::create_directories(file.parent_path());
  std::ofstream(file, std::ios::binary) << bytes;
}

/// Two images in each of the five training files, one in the test file: labels 0, 1, 2, ...
void write_cifar10(const std::filesystem::path& folder) {
  int image = 0;
  for (int i = 1; i <= 5; ++i) {
    std::string bytes;
    for (int k = 0; k < 2; ++k, ++image) {
      bytes += record(std::string(1, static_cast<char>(image)), image);
    }
    write(folder / ("data_batch_" + std::to_string(i) + ".bin"), bytes);
  }
  write(folder / "test_batch.bin", record(std::string(1, '\7'), image));
}

std::string error_of(const std::filesystem::path& folder, cifar::DatasetName dataset = cifar::DatasetName::cifar10) {
  try {
    (void)cifar::read_binary_files(folder, dataset);
  } catch (const cifar::DataError& error) {
    return error.what();
  }
  return "no error";
}

using Catch::Matchers::Contains;

}  // namespace

TEST_CASE("CIFAR-10 files are read, from their folder and from its parent") {
  const TemporaryFolder parent;
  const auto folder = parent.path() / "cifar-10-batches-bin";
  write_cifar10(folder);
  const bool from_parent = GENERATE(false, true);
  const auto data = cifar::read_binary_files(from_parent ? parent.path() : folder, cifar::DatasetName::cifar10);
  CHECK(data.classes == 10);
  CHECK(torch::equal(data.train.labels, torch::arange(10)));
  CHECK(torch::equal(data.test.labels, torch::full({1}, 7, torch::kInt64)));
  REQUIRE(data.train.pixels.sizes() == torch::IntArrayRef{10, 3, 32, 32});
  // Image 6 is the first one of the fourth file; green is plane 1; rows are 32 bytes.
  CHECK(data.train.pixels[6][1][5][9].item<int>() == pixel(6, 1024 + 5 * 32 + 9));
  CHECK(data.test.pixels[0][2][31][31].item<int>() == pixel(10, 3071));
  REQUIRE(data.notes.size() == 6);  // None has the official size.
  CHECK_THAT(data.notes.front(), Contains("data_batch_1.bin holds 2 images, the official file 10000"));
}

TEST_CASE("CIFAR-100 files are read by their fine labels") {
  const TemporaryFolder parent;
  const auto folder = parent.path() / "cifar-100-binary";
  write(folder / "train.bin", record(std::string{'\3', '\x63'}, 1) + record(std::string{'\x13', '\0'}, 2));
  write(folder / "test.bin", record(std::string{'\0', '\1'}, 3));
  const auto data = cifar::read_binary_files(parent.path(), cifar::DatasetName::cifar100);
  CHECK(data.classes == 100);
  CHECK(torch::equal(data.train.labels, torch::tensor({99, 0}, torch::kInt64)));
  CHECK(data.train.pixels[1][0][0][0].item<int>() == pixel(2, 0));

  write(folder / "train.bin", record(std::string{'\x14', '\0'}, 1));
  CHECK_THAT(error_of(folder, cifar::DatasetName::cifar100),
             Contains("train.bin: the coarse label at offset 0 (image 0) is 20, expected 0 to 19"));
  write(folder / "train.bin", record(std::string{'\0', '\0'}, 1) + record(std::string{'\0', '\x64'}, 1));
  CHECK_THAT(error_of(folder, cifar::DatasetName::cifar100),
             Contains("the fine label at offset 3075 (image 1) is 100, expected 0 to 99"));
}

TEST_CASE("a damaged CIFAR-10 file is named with the offset and what was expected") {
  const TemporaryFolder parent;
  const auto folder = parent.path() / "cifar-10-batches-bin";
  write_cifar10(folder);
  REQUIRE(error_of(folder) == "no error");
  const auto file = folder / "data_batch_3.bin";

  SECTION("truncated inside a record") {
    std::filesystem::resize_file(file, 4000);
    CHECK_THAT(error_of(folder), Contains(file.string()) && Contains("offset 3073 stops after 927 bytes") &&
                                     Contains("(4000 bytes); expected whole records of 3073 bytes") &&
                                     Contains("30730000 bytes in the official file"));
  }
  SECTION("too long") {
    std::filesystem::resize_file(file, 2 * 3073 + 1);
    CHECK_THAT(error_of(folder), Contains(file.string()) && Contains("offset 6146 stops after 1 bytes"));
  }
  SECTION("larger than the official one") {
    std::filesystem::resize_file(file, 10001 * 3073);
    CHECK_THAT(error_of(folder), Contains(file.string()) && Contains("30733073 bytes, more than the official one"));
  }
  SECTION("empty") {
    std::filesystem::resize_file(file, 0);
    CHECK_THAT(error_of(folder), Contains(file.string()) && Contains("is empty; expected whole records of 3073"));
  }
  SECTION("a label out of range") {
    write(file, record("\1", 0) + record("\xc8", 1));
    CHECK_THAT(error_of(folder), Contains(file.string()) && Contains("the label at offset 3073 (image 1) is 200") &&
                                     Contains("expected 0 to 9"));
  }
  SECTION("missing") {
    std::filesystem::remove(file);
    CHECK_THAT(error_of(folder), Contains(file.string()) && Contains("no such file"));
  }
  SECTION("a folder in the file's place") {
    std::filesystem::remove(file);
    std::filesystem::create_directory(file);
    CHECK_THAT(error_of(folder), Contains(file.string()) && Contains("not a readable file"));
  }
}

TEST_CASE("a missing folder, and one without the files, are named") {
  const TemporaryFolder parent;
  CHECK_THAT(error_of(parent.path() / "absent"),
             Contains("absent: no such folder") && Contains("cifar-10-batches-bin"));
  CHECK_THAT(error_of(parent.path()), Contains(parent.path().string()) && Contains("holds neither test_batch.bin"));
}
