#include "recorded_norms.hpp"

#include <fmt/format.h>

#include <fstream>

#include "data.hpp"
#include "json.hpp"

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
    std::string problem;
    try {
      const Json json = parsed(line);
      const Json& step = json.at("step");
      const auto norm = json.at("gradient_norm").get<double>();
      if (step.is_number_integer() && step.get<std::int64_t>() >= 0 && norm >= 0) {
        norms_[step.get<std::int64_t>()] = norm;
      } else {
        problem = fmt::format("step is {}, gradient_norm {}", step.dump(), norm);
      }
    } catch (const std::exception& error) {
      problem = error.what();
    }
    if (!problem.empty()) {
      throw DataError(
          fmt::format("{}: line {} has no step and gradient_norm to graft: {}", file.string(), number, problem));
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
