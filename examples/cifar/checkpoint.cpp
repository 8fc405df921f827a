#include "checkpoint.hpp"

#include <fmt/format.h>

#include <fstream>
#include <sstream>

#include "atomic_file.hpp"
#include "checksum.hpp"

namespace cifar {

namespace {

constexpr std::string_view format_name = "microreg-checkpoint-1";

/// One line, so that `head -n 1` shows it.
std::string header(std::int64_t step, std::string_view bytes) {
  return fmt::format("{} step {} bytes {} fnv1a {:016x}\n", format_name, step, bytes.size(), fnv1a(bytes));
}

/// Throws CheckpointError with the reason alone.
Checkpoints::Loaded read(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  std::string first_line;
  if (!stream || !std::getline(stream, first_line)) {
    throw CheckpointError("it is empty or cannot be read");
  }
  std::istringstream words(first_line);
  std::string name;
  std::string label;
  std::int64_t step = -1;
  if (!(words >> name >> label >> step) || name != format_name) {
    throw CheckpointError(fmt::format("it does not begin with {}", format_name));
  }
  std::string bytes{std::istreambuf_iterator<char>(stream), {}};
  if (const std::string expected = header(step, bytes); expected != first_line + "\n") {
    throw CheckpointError(fmt::format("its header says \"{}\", its contents \"{}\"", first_line,
                                      expected.substr(0, expected.size() - 1)));
  }
  return {path, step, std::move(bytes)};
}

}  // namespace

void Checkpoints::save(std::int64_t step, std::string_view bytes) const {
  replace_file(next(), header(step, bytes).append(bytes));
  std::error_code error;
  if (std::filesystem::exists(last(), error)) {
    std::filesystem::rename(last(), previous(), error);
  }
  if (!error) {
    std::filesystem::rename(next(), last(), error);
  }
  if (error) {
    fail_to_write(last(), error.message());
  }
  sync_file(folder_);
}

std::optional<Checkpoints::Loaded> Checkpoints::load(std::vector<std::string>& notes) const {
  std::string damage;
  for (const std::filesystem::path& path : {next(), last(), previous()}) {
    if (!std::filesystem::exists(path)) {
      continue;
    }
    try {
      Loaded loaded = read(path);
      if (!damage.empty()) {
        notes.push_back(fmt::format("{}; going on from {} instead", damage, path.string()));
      }
      return loaded;
    } catch (const CheckpointError& error) {
      damage += fmt::format("{}{} is damaged: {}", damage.empty() ? "" : "; ", path.string(), error.what());
    }
  }
  if (!damage.empty()) {
    throw CheckpointError(damage + "; no checkpoint is left: start anew with --overwrite instead of --resume");
  }
  return std::nullopt;
}

void Checkpoints::remove() const {
  for (const std::filesystem::path& path : {next(), last(), previous()}) {
    std::error_code ignored;
    std::filesystem::remove(path, ignored);
  }
}

}  // namespace cifar
