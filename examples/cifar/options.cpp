#include "options.hpp"

#include <fmt/format.h>

#include <cmath>

namespace cifar {

namespace {

void require_at_least(std::string_view option, std::int64_t value, std::int64_t least) {
  if (value < least) {
    throw UsageError(fmt::format("{} is {}; it must be at least {}", option, value, least));
  }
}

}  // namespace

double default_strength(Method method) noexcept {
  switch (method) {
    case Method::sgd:
    case Method::large_batch:
      return 0;
    case Method::gradient_norm:
    case Method::fisher_trace:
      return 0.01;
    case Method::average_jacobian:
    case Method::unit_jacobian:
      return 0.001;
  }
  return 0;
}

std::int64_t default_batch_size(Method method, std::int64_t micro_batch_size) noexcept {
  return method == Method::sgd ? micro_batch_size : Options{}.batch_size;
}

void validate(const Options& options) {
  require_at_least("--batch-size", options.batch_size, 1);
  require_at_least("--micro-batch-size", options.micro_batch_size, 1);
  require_at_least("--steps", options.steps, 1);
  require_at_least("--seed", options.seed, 0);
  require_at_least("--threads", options.threads, 0);
  require_at_least("--log-every", options.log_every, 1);
  require_at_least("--train-size", options.train_size, 0);
  require_at_least("--test-size", options.test_size, 0);
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
  if (options.data == "synthetic" && options.dataset != DatasetName::cifar10) {
    throw UsageError("--dataset cifar100 needs --data DIR: the synthetic images have 10 classes");
  }
}

}  // namespace cifar
