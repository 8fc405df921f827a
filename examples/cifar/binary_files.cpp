#include "binary_files.hpp"

#include <fmt/format.h>

#include <cstring>
#include <fstream>

namespace cifar {

namespace {

constexpr std::int64_t pixel_bytes = 3 * 32 * 32;

/// A label byte of a record.
struct Label {
  std::string_view name;
  int classes;
};

struct FileLayout {
  std::string_view folder;
  std::vector<std::string> train_files;
  std::string test_file;
  std::int64_t train_records;  // in each official training file
  std::int64_t test_records;
  std::vector<Label> labels;  // the last one is what is learned
  Normalization normalization;

  [[nodiscard]] std::int64_t label_bytes() const { return static_cast<std::int64_t>(labels.size()); }
  [[nodiscard]] std::int64_t record_bytes() const { return label_bytes() + pixel_bytes; }
};

FileLayout layout_of(DatasetName dataset) {
  if (dataset == DatasetName::cifar10) {
    return {.folder = "cifar-10-batches-bin",
            .train_files = {"data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin",
                            "data_batch_5.bin"},
            .test_file = "test_batch.bin",
            .train_records = 10000,
            .test_records = 10000,
            .labels = {{"label", 10}},
            .normalization = {{0.4914, 0.4822, 0.4465}, {0.2470, 0.2435, 0.2616}}};
  }
  return {.folder = "cifar-100-binary",
          .train_files = {"train.bin"},
          .test_file = "test.bin",
          .train_records = 50000,
          .test_records = 10000,
          .labels = {{"coarse label", 20}, {"fine label", 100}},
          .normalization = {{0.5071, 0.4865, 0.4409}, {0.2673, 0.2564, 0.2762}}};
}

std::filesystem::path find_folder(const std::filesystem::path& given, const FileLayout& layout) {
  if (!std::filesystem::exists(given)) {
    throw DataError(
        fmt::format("{}: no such folder; --data expects {} or the folder that holds it (download.sh fetches "
                    "the official archives)",
                    given.string(), layout.folder));
  }
  for (const auto& folder : {given / layout.folder, given}) {
    if (std::filesystem::exists(folder / layout.test_file)) {
      return folder;
    }
  }
  throw DataError(fmt::format("{}: holds neither {} nor {}/{}; --data expects the folder {} or the one that holds it",
                              given.string(), layout.test_file, layout.folder, layout.test_file, layout.folder));
}

/// Throws DataError unless a file of `bytes` holds whole records, and no more of them than the official one: room is
/// made for what it holds.
void check_size(const std::filesystem::path& file, std::uintmax_t bytes, std::int64_t official,
                const FileLayout& layout) {
  const auto record = static_cast<std::uintmax_t>(layout.record_bytes());
  const std::uintmax_t all = static_cast<std::uintmax_t>(official) * record;
  const std::string expected = fmt::format(
      "expected whole records of {} bytes ({} of labels, {} of pixels), {} bytes in "
      "the official file",
      record, layout.label_bytes(), pixel_bytes, all);
  if (bytes == 0) {
    throw DataError(fmt::format("{}: the file is empty; {}", file.string(), expected));
  }
  if (bytes > all) {
    throw DataError(
        fmt::format("{}: the file has {} bytes, more than the official one; {}", file.string(), bytes, expected));
  }
  if (bytes % record != 0) {
    throw DataError(
        fmt::format("{}: the record at offset {} stops after {} bytes, at the end of the file ({} bytes); {}",
                    file.string(), bytes - bytes % record, bytes % record, bytes, expected));
  }
}

std::vector<char> read_bytes(const std::filesystem::path& file, std::int64_t official, const FileLayout& layout) {
  std::ifstream stream(file, std::ios::binary);
  if (!stream || !std::filesystem::is_regular_file(file)) {
    throw DataError(fmt::format("{}: cannot be read: {}", file.string(),
                                std::filesystem::exists(file) ? "not a readable file" : "no such file"));
  }
  const std::uintmax_t size = std::filesystem::file_size(file);
  check_size(file, size, official, layout);
  std::vector<char> bytes(size);
  if (!stream.read(bytes.data(), static_cast<std::streamsize>(bytes.size()))) {
    throw DataError(fmt::format("{}: reading stopped at offset {}, expected {} bytes", file.string(), stream.gcount(),
                                bytes.size()));
  }
  return bytes;
}

Images read_file(const std::filesystem::path& file, std::int64_t official, const FileLayout& layout,
                 std::vector<std::string>& notes) {
  const std::vector<char> bytes = read_bytes(file, official, layout);
  const std::int64_t count = static_cast<std::int64_t>(bytes.size()) / layout.record_bytes();
  if (count != official) {
    notes.push_back(fmt::format("{} holds {} images, the official file {}", file.string(), count, official));
  }
  Images images{torch::empty({count, 3, 32, 32}, torch::kUInt8), torch::empty({count}, torch::kInt64)};
  auto* pixels = images.pixels.data_ptr<std::uint8_t>();
  auto* labels = images.labels.data_ptr<std::int64_t>();
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t offset = i * layout.record_bytes();
    for (std::int64_t l = 0; l < layout.label_bytes(); ++l) {
      const Label& label = layout.labels[static_cast<std::size_t>(l)];
      const auto value = static_cast<std::uint8_t>(bytes[static_cast<std::size_t>(offset + l)]);
      if (value >= label.classes) {
        throw DataError(fmt::format("{}: the {} at offset {} (image {}) is {}, expected 0 to {}", file.string(),
                                    label.name, offset + l, i, value, label.classes - 1));
      }
      labels[i] = value;
    }
    std::memcpy(pixels + i * pixel_bytes, bytes.data() + offset + layout.label_bytes(), pixel_bytes);
  }
  return images;
}

}  // namespace

Data read_binary_files(const std::filesystem::path& folder, DatasetName dataset) {
  const FileLayout layout = layout_of(dataset);
  const std::filesystem::path found = find_folder(folder, layout);
  Data data;
  data.classes = layout.labels.back().classes;
  data.normalization = layout.normalization;
  std::vector<torch::Tensor> pixels;
  std::vector<torch::Tensor> labels;
  for (const std::string& name : layout.train_files) {
    Images part = read_file(found / name, layout.train_records, layout, data.notes);
    pixels.push_back(std::move(part.pixels));
    labels.push_back(std::move(part.labels));
  }
  data.train = {torch::cat(pixels), torch::cat(labels)};
  data.test = read_file(found / layout.test_file, layout.test_records, layout, data.notes);
  return data;
}

}  // namespace cifar
