#include "recorded_norms.hpp"

#include <fmt/format.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "data.hpp"

namespace cifar {

RecordedNorms::RecordedNorms(const std::filesystem::path& run) {
  const std::filesystem::path file = run / "metrics.jsonl";
  std::ifstream stream(file);
  if (!stream) {
    throw DataError(
        fmt::format("{}: cannot be read; --norms-from expects the --output folder of an sgd run", file.string()));
  }
  std::string line;
  for (int number = 1; std::getline(stream, line); ++number) {
    try {
      const auto json = nlohmann::json::parse(line);
      norms_[json.at("step").get<std::int64_t>()] = json.at("gradient_norm").get<double>();
    } catch (const nlohmann::json::exception& error) {
      throw DataError(
          fmt::format("{}: line {} has no step and gradient_norm to graft: {}", file.string(), number, error.what()));
    }
  }
  if (norms_.empty()) {
    throw DataError(fmt::format("{}: is empty; record the sgd run with --log-every below its --steps", file.string()));
  }
}

double RecordedNorms::at(std::int64_t step) const {
  const auto record = norms_.upper_bound(step);  // the first one that counts this step
  return record != norms_.end() ? record->second : norms_.rbegin()->second;
}

}  // namespace cifar
