#include "records.hpp"

#include <fmt/format.h>

#include <cerrno>
#include <cstring>
#include <microreg/version.hpp>
#include <system_error>

#include "atomic_file.hpp"
#include "json.hpp"

namespace cifar {

namespace {

constexpr const char* metrics_name = "metrics.jsonl";

Json json_of(const Options& options) {
  Json monitors = Json::array();
  for (const Monitor monitor : options.monitors) {
    monitors.push_back(name_of(monitor_names, monitor));
  }
  return {{"data", options.data},
          {"dataset", name_of(dataset_names, options.dataset)},
          {"split", name_of(split_names, options.split)},
          {"train_size", options.train_size},
          {"validation_size", options.validation_size},
          {"test_size", options.test_size},
          {"image_size", options.image_size},
          {"augment", options.augment},
          {"model", name_of(architecture_names, options.model)},
          {"width", options.width},
          {"method", name_of(method_names, options.method)},
          {"strength", options.strength},
          {"warm_up", options.warm_up},
          {"norms_from", options.norms_from},
          {"estimator", name_of(estimator_names, options.estimator)},
          {"micro_batch_share", options.micro_batch_share},
          {"every", options.every},
          {"weighting", name_of(weighting_names, options.weighting)},
          {"batch_size", options.batch_size},
          {"micro_batch_size", options.micro_batch_size},
          {"learning_rate", options.learning_rate},
          {"schedule", name_of(schedule_names, options.schedule)},
          {"steps", options.steps},
          {"seed", options.seed},
          {"layout", name_of(layout_names, options.layout)},
          {"log_every", options.log_every},
          {"monitors", std::move(monitors)},
          {"monitor_on", name_of(monitor_on_names, options.monitor_on)},
          {"output", options.output}};
}

std::string accuracy_name(Split split) { return split == Split::holdout ? "validation_accuracy" : "test_accuracy"; }

}  // namespace

Records::Records(const Options& options) : folder_(options.output), accuracy_name_(accuracy_name(options.split)) {
  if (folder_.empty()) {
    return;
  }
  std::error_code error;
  std::filesystem::create_directories(folder_, error);
  if (error) {
    fail_to_write(folder_, error.message());
  }
  const std::filesystem::path metrics = folder_ / metrics_name;
  if (!options.overwrite && !options.resume && std::filesystem::exists(metrics, error) &&
      !std::filesystem::is_empty(metrics, error)) {
    throw UsageError(
        fmt::format("--output {}: holds the records of another run ({}); choose another folder, go on with that run by "
                    "--resume, or replace it by --overwrite",
                    folder_.string(), metrics.string()));
  }
  metrics_.open(metrics, options.resume ? std::ios::app : std::ios::trunc);
  if (!metrics_) {
    fail_to_write(metrics, std::strerror(errno));
  }
}

std::string Records::config(const Options& options, const std::string& device, int threads, std::int64_t ranks) {
  Json config = json_of(options);
  config["device"] = device;
  config["threads"] = threads;
  config["ranks"] = ranks;
  config["workers"] = options.workers;
  config["microreg_version"] = microreg::version;
  return config.dump(2);
}

void Records::begin(const std::string& config) const {
  replace("config.json", config);
  if (!folder_.empty()) {
    std::filesystem::remove(folder_ / "summary.json");
  }
}

void Records::append(const Metrics& metrics) {
  if (folder_.empty()) {
    return;
  }
  Json line{{"step", metrics.step},
            {"train_loss", metrics.train_loss},
            {accuracy_name_, metrics.accuracy},
            {"micro_batch_gradient_norm", metrics.micro_batch_gradient_norm},
            {"gradient_norm", metrics.gradient_norm},
            {"penalty", metrics.penalty},
            {"seconds", metrics.seconds}};
  for (const auto& [name, value] : metrics.monitors) {
    line[name] = value;
  }
  metrics_ << line.dump() << '\n' << std::flush;
  if (!metrics_) {
    fail_to_write(folder_ / metrics_name, std::strerror(errno));
  }
}

void Records::write_summary(const Summary& summary) const {
  Json json{{"status", summary.status},
            {"steps", summary.steps},
            {"best_" + accuracy_name_, summary.best_accuracy},
            {"best_step", summary.best_step},
            {"final_" + accuracy_name_, summary.final_accuracy}};
  if (summary.test_accuracy.has_value()) {
    json["test_accuracy"] = *summary.test_accuracy;
  }
  json["seconds"] = summary.seconds;
  json["seconds_per_step"] = summary.seconds_per_step;
  if (!summary.weights_checksum.empty()) {
    json["weights_checksum"] = summary.weights_checksum;
  }
  if (!summary.message.empty()) {
    json["message"] = summary.message;
  }
  replace("summary.json", json.dump(2));
}

std::int64_t Records::sync() {
  sync_file(folder_ / metrics_name);
  return static_cast<std::int64_t>(std::filesystem::file_size(folder_ / metrics_name));
}

void Records::rewind(std::int64_t bytes) {
  const std::filesystem::path metrics = folder_ / metrics_name;
  const auto size = static_cast<std::int64_t>(std::filesystem::file_size(metrics));
  if (size < bytes) {
    throw std::runtime_error(
        fmt::format("{}: holds {} bytes, but {} when the checkpoint was written; was it changed? Put it back, or start "
                    "anew with --overwrite instead of --resume",
                    metrics.string(), size, bytes));
  }
  std::filesystem::resize_file(metrics, static_cast<std::uintmax_t>(bytes));  // The stream appends.
}

void Records::replace(const std::string& name, const std::string& text) const {
  if (!folder_.empty()) {
    replace_file(folder_ / name, text + "\n");
  }
}

void check_same_run(const std::string& saved, const std::string& now, const Options& options) {
  const Json before = [&] {
    try {
      return parsed(saved);
    } catch (const std::exception& error) {
      throw UsageError(fmt::format(
          "--resume: the options in the checkpoint cannot be read ({}); start anew with --overwrite instead",
          error.what()));
    }
  }();
  const Json after = Json::parse(now);
  for (const auto& [name, value] : after.items()) {
    const Json old = before.contains(name) ? before.at(name) : Json();
    if (name == "ranks" || (name == "threads" && before.value("ranks", 1) != after.value("ranks", 1))) {
      continue;  // the same run, divided otherwise
    }
    const bool longer = name == "steps" && options.schedule == Schedule::constant && value > old;
    const bool same_bits = name == "workers" && old.is_number() && value > 0 && old > 0;
    if (value != old && name != "output" && !longer && !same_bits) {
      throw UsageError(
          fmt::format("--resume: {} is {}, but {} in the run to go on with; give the same options, or start "
                      "anew with --overwrite",
                      name, value.dump(), old.dump()));
    }
  }
}

}  // namespace cifar
