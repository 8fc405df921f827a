/// @file
/// A run of a few steps, and what it leaves.
#pragma once

#include "temporary_folder.hpp"
#include "trainer.hpp"

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

using Json = nlohmann::json;

inline cifar::Options small_run(const std::filesystem::path& output) {
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

/// What `--method` fills in.
inline void set_method(cifar::Options& options, cifar::Method method, const std::filesystem::path& recorded) {
  options.method = method;
  options.strength = cifar::default_strength(method);
  options.norms_from = method == cifar::Method::external_grafting ? recorded.string() : "";
}

inline cifar::Summary run(const cifar::Options& options) {
  cifar::Progress silent(nullptr);
  return cifar::train(options, silent);
}

inline Json json_of(const std::filesystem::path& file) { return Json::parse(std::ifstream(file)); }

inline std::vector<Json> lines_of(const std::filesystem::path& file) {
  std::vector<Json> lines;
  std::ifstream stream(file);
  for (std::string line; std::getline(stream, line);) {
    lines.push_back(Json::parse(line));
  }
  return lines;
}

/// The records of a run but for its duration, which no run repeats.
inline std::vector<Json> timeless_metrics(const std::filesystem::path& folder) {
  std::vector<Json> lines = lines_of(folder / "metrics.jsonl");
  for (Json& line : lines) {
    line.erase("seconds");
  }
  return lines;
}
