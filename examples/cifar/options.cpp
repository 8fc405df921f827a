#include "options.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numbers>

namespace cifar {

namespace {

void require_at_least(std::string_view option, std::int64_t value, std::int64_t least) {
  if (value < least) {
    throw UsageError(fmt::format("{} is {}; it must be at least {}", option, value, least));
  }
}

}  // namespace

std::string field_name(std::string_view name) {
  std::string field(name);
  std::replace(field.begin(), field.end(), '-', '_');
  return field;
}

double default_strength(Method method) noexcept {
  switch (method) {
    case Method::gradient_norm:
    case Method::fisher_trace:
      return 0.01;
    case Method::average_jacobian:
    case Method::unit_jacobian:
      return 0.001;
    default:
      return 0;
  }
}

Split default_split(const std::string& data) noexcept {
  return data == "synthetic" ? Split::reference : Split::holdout;
}

double learning_rate_at(const Options& options, std::int64_t step) noexcept {
  const double done = static_cast<double>(step) / static_cast<double>(options.steps);
  switch (options.schedule) {
    case Schedule::cosine:
      return options.learning_rate * (1 + std::cos(std::numbers::pi * done)) / 2;
    case Schedule::drops:
      return options.learning_rate * (done < 0.5 ? 1 : done < 0.75 ? 0.1 : 0.01);
    case Schedule::constant:
      break;
  }
  return options.learning_rate;
}

std::int64_t default_batch_size(Method method, std::int64_t micro_batch_size) noexcept {
  return method == Method::sgd ? micro_batch_size : Options{}.batch_size;
}

std::int64_t resolved_workers(const Options& options, bool on_cpu, int threads) noexcept {
  if (options.workers >= 0) {
    return options.workers;
  }
  return on_cpu && options.batch_size > options.micro_batch_size ? threads : 0;
}

void validate(const Options& options) {
  require_at_least("--batch-size", options.batch_size, 1);
  require_at_least("--micro-batch-size", options.micro_batch_size, 1);
  require_at_least("--steps", options.steps, 1);
  require_at_least("--seed", options.seed, 0);
  require_at_least("--threads", options.threads, 0);
  require_at_least("--workers", options.workers, -1);
  require_at_least("--log-every", options.log_every, 1);
  require_at_least("--train-size", options.train_size, 0);
  require_at_least("--validation-size", options.validation_size, 0);
  require_at_least("--test-size", options.test_size, 0);
  require_at_least("--warm-up", options.warm_up, 0);
  require_at_least("--every", options.every, 1);
  require_at_least("--checkpoint-every", options.checkpoint_every, 0);
  require_at_least("--width", options.width, 0);
  if (options.image_size != 32 && options.image_size != 16) {
    throw UsageError(
        fmt::format("--image-size is {}; it must be 32, or 16 to pool the images by 2", options.image_size));
  }
  if (!std::isfinite(options.learning_rate) || options.learning_rate <= 0) {
    throw UsageError(fmt::format("--learning-rate is {}; it must be a finite number above 0", options.learning_rate));
  }
  if (!std::isfinite(options.strength) || options.strength < 0) {
    throw UsageError(fmt::format("--strength is {}; it must be a finite number, at least 0", options.strength));
  }
  if (!has_penalty(options.method) && options.strength != 0) {
    throw UsageError(
        fmt::format("--strength is {}, but --method {} has no penalty; leave it out, or choose a method "
                    "with a penalty such as gradient-norm",
                    options.strength, name_of(method_names, options.method)));
  }
  if (!(options.micro_batch_share > 0 && options.micro_batch_share <= 1)) {
    throw UsageError(
        fmt::format("--micro-batch-share is {}; it must be above 0 and at most 1", options.micro_batch_share));
  }
  if (options.method == Method::external_grafting && options.norms_from.empty()) {
    throw UsageError("--method external-grafting needs --norms-from DIR: the --output folder of an sgd run");
  }
  if (options.method != Method::external_grafting && !options.norms_from.empty()) {
    throw UsageError(fmt::format("--norms-from is for --method external-grafting, not {}; leave it out",
                                 name_of(method_names, options.method)));
  }
  if (options.resume && options.overwrite) {
    throw UsageError("--resume and --overwrite exclude each other: go on from the checkpoint, or start anew");
  }
  if (options.resume && options.output.empty()) {
    throw UsageError("--resume needs --output DIR, the folder of the run to go on with");
  }
  if (options.data == "synthetic" && options.dataset != DatasetName::cifar10) {
    throw UsageError("--dataset cifar100 needs --data DIR: the synthetic images have 10 classes");
  }
}

}  // namespace cifar
