#include "records.hpp"

#include <fmt/format.h>

#include <cerrno>
#include <cstring>
#include <microreg/version.hpp>
#include <nlohmann/json.hpp>
#include <system_error>

namespace cifar {

using Json = nlohmann::ordered_json;

namespace {

[[noreturn]] void fail(const std::filesystem::path& path, std::string_view reason) {
  throw std::runtime_error(
      fmt::format("{}: cannot be written: {}; choose another folder with --output, or free space on its disk",
                  path.string(), reason));
}

Json json_of(const Options& options) {
  return {{"data", options.data},
          {"dataset", name_of(dataset_names, options.dataset)},
          {"train_size", options.train_size},
          {"test_size", options.test_size},
          {"image_size", options.image_size},
          {"augment", options.augment},
          {"model", name_of(architecture_names, options.model)},
          {"width", options.width},
          {"method", name_of(method_names, options.method)},
          {"strength", options.strength},
          {"batch_size", options.batch_size},
          {"micro_batch_size", options.micro_batch_size},
          {"learning_rate", options.learning_rate},
          {"steps", options.steps},
          {"seed", options.seed},
          {"log_every", options.log_every},
          {"output", options.output}};
}

}  // namespace

Records::Records(std::filesystem::path folder, bool overwrite) : folder_(std::move(folder)) {
  if (folder_.empty()) {
    return;
  }
  std::error_code error;
  std::filesystem::create_directories(folder_, error);
  if (error) {
    fail(folder_, error.message());
  }
  const std::filesystem::path metrics = folder_ / "metrics.jsonl";
  if (!overwrite && std::filesystem::exists(metrics, error) && !std::filesystem::is_empty(metrics, error)) {
    throw UsageError(
        fmt::format("--output {}: holds the records of another run ({}); choose another folder, or add "
                    "--overwrite to replace them",
                    folder_.string(), metrics.string()));
  }
  std::filesystem::remove(folder_ / "summary.json", error);
  metrics_.open(metrics, std::ios::trunc);
  if (!metrics_) {
    fail(metrics, std::strerror(errno));
  }
}

void Records::write_config(const Options& options, const std::string& device, int threads) {
  Json config = json_of(options);
  config["device"] = device;
  config["threads"] = threads;
  config["microreg_version"] = microreg::version;
  replace("config.json", config.dump(2));
}

void Records::append(const Metrics& metrics) {
  if (folder_.empty()) {
    return;
  }
  const Json line{{"step", metrics.step},
                  {"train_loss", metrics.train_loss},
                  {"test_accuracy", metrics.test_accuracy},
                  {"micro_batch_gradient_norm", metrics.micro_batch_gradient_norm},
                  {"penalty", metrics.penalty},
                  {"seconds", metrics.seconds}};
  metrics_ << line.dump() << '\n' << std::flush;
  if (!metrics_) {
    fail(folder_ / "metrics.jsonl", std::strerror(errno));
  }
}

void Records::write_summary(const Summary& summary) {
  Json json{{"status", summary.status},
            {"steps", summary.steps},
            {"best_test_accuracy", summary.best_test_accuracy},
            {"best_step", summary.best_step},
            {"final_test_accuracy", summary.final_test_accuracy},
            {"seconds", summary.seconds},
            {"seconds_per_step", summary.seconds_per_step}};
  if (!summary.message.empty()) {
    json["message"] = summary.message;
  }
  replace("summary.json", json.dump(2));
}

void Records::replace(const std::string& name, const std::string& text) const {
  if (folder_.empty()) {
    return;
  }
  const std::filesystem::path temporary = folder_ / (name + ".tmp");
  std::ofstream stream(temporary, std::ios::trunc);
  stream << text << '\n' << std::flush;
  if (!stream) {
    fail(temporary, std::strerror(errno));
  }
  stream.close();
  std::filesystem::rename(temporary, folder_ / name);
}

}  // namespace cifar
