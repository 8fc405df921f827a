#include "trainer.hpp"

#include <fmt/format.h>

#include <microreg/error.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>

#include "augmentation.hpp"
#include "data.hpp"
#include "data_order.hpp"
#include "evaluation.hpp"
#include "methods.hpp"
#include "models.hpp"
#include "random_streams.hpp"

namespace cifar {

namespace {

constexpr std::int64_t probe_micro_batches = 16;

torch::Device device_of(const std::string& name) {
  if (name == "auto") {
    return torch::cuda::is_available() ? torch::Device(torch::kCUDA, 0) : torch::Device(torch::kCPU);
  }
  try {
    torch::Device device(name);
    if (device.is_cuda() && device.index() < 0) {
      device = torch::Device(torch::kCUDA, 0);
    }
    if (!device.is_cpu() && !(device.is_cuda() && device.index() < torch::cuda::device_count())) {
      throw UsageError(fmt::format("--device is {}, but there {}; use cpu or auto", name,
                                   torch::cuda::is_available()
                                       ? fmt::format("are {} CUDA devices", torch::cuda::device_count())
                                       : "is no CUDA device"));
    }
    return device;
  } catch (const c10::Error& error) {
    throw UsageError(
        fmt::format("--device is {}: {}; use cpu, cuda, cuda:1 or auto", name, error.what_without_backtrace()));
  }
}

Images on(const Images& images, torch::Device device) { return {images.pixels.to(device), images.labels.to(device)}; }

/// A sum that stays on the device until it is read.
class RunningMean {
 public:
  void add(const torch::Tensor& value) {
    sum_ = sum_.defined() ? sum_ + value : value;
    ++count_;
  }
  double take() {
    const double mean = sum_.item<double>() / static_cast<double>(count_);
    *this = {};
    return mean;
  }

 private:
  torch::Tensor sum_;
  std::int64_t count_ = 0;
};

class Run {
 public:
  Run(const Options& options, torch::Device device, const Data& data, Records& records, Progress& progress)
      : options_(options),
        device_(device),
        train_(on(data.train, device)),
        test_(on(data.test, device)),
        normalization_(data.normalization),
        records_(records),
        progress_(progress),
        order_(data.train.size(), options.batch_size, options.seed) {
    torch::manual_seed(stream_seed(options.seed, Stream::weights));
    // Made on the CPU, so that the weights are the same on every device.
    model_ =
        make_model(options.model, {.classes = data.classes, .image_size = options.image_size, .width = options.width});
    model_->to(device);
    step_ = make_step(options.method, model_,
                      std::make_shared<torch::optim::SGD>(model_->parameters(), options.learning_rate),
                      {.strength = options.strength,
                       .micro_batch_size = options.micro_batch_size,
                       .generator = stream_generator(device, options.seed, Stream::penalty),
                       .check_finite = microreg::CheckFinite::always});
    probe_ = probe_images();
  }

  Summary operator()() {
    start_ = Clock::now();
    try {
      for (std::int64_t step = 0; step < options_.steps; ++step) {
        train_step(step);
        progress_.step(step + 1, options_.steps);
        if ((step + 1) % options_.log_every == 0 || step + 1 == options_.steps) {
          record(step + 1);
        }
      }
    } catch (const microreg::NonFiniteError& error) {
      summary_.status = "diverged";
      summary_.message = error.what();
      finish();
      throw;
    }
    finish();
    return summary_;
  }

 private:
  using Clock = std::chrono::steady_clock;

  [[nodiscard]] static double since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  }

  /// The same images throughout the run, and for every method: what is compared is the network.
  [[nodiscard]] Images probe_images() const {
    const std::int64_t count = std::min(train_.size(), probe_micro_batches * options_.micro_batch_size);
    const torch::Tensor chosen =
        torch::randperm(train_.size(), stream_generator(torch::kCPU, options_.seed, Stream::probe), torch::kInt64)
            .narrow(0, 0, count)
            .to(device_);
    return {train_.pixels.index_select(0, chosen), train_.labels.index_select(0, chosen)};
  }

  void train_step(std::int64_t step) {
    const auto begin = Clock::now();
    const torch::Tensor indices = order_.batch(step).to(device_);
    torch::Tensor pixels = train_.pixels.index_select(0, indices);
    if (options_.augment) {
      const std::int64_t padding = options_.image_size / 8;  // 4 at the full size, as usual
      const auto generator = stream_generator(device_, options_.seed, Stream::augmentation, step);
      pixels = crop_and_flip(pixels, padding, draw_crop_and_flip(pixels.size(0), padding, generator));
    }
    const microreg::Report report = step_(normalized(pixels, normalization_), train_.labels.index_select(0, indices));
    loss_.add(report.loss);
    penalty_.add(report.penalties.front().value * report.penalties.front().strength);
    step_seconds_ += since(begin);
    summary_.steps = step + 1;
  }

  void record(std::int64_t step) {
    const Metrics metrics{.step = step,
                          .train_loss = loss_.take(),
                          .test_accuracy = accuracy(*model_, test_, normalization_),
                          .micro_batch_gradient_norm =
                              micro_batch_gradient_norm(model_, probe_, normalization_, options_.micro_batch_size),
                          .penalty = penalty_.take(),
                          .seconds = since(start_)};
    if (metrics.test_accuracy > summary_.best_test_accuracy) {
      summary_.best_test_accuracy = metrics.test_accuracy;
      summary_.best_step = step;
    }
    summary_.final_test_accuracy = metrics.test_accuracy;
    records_.append(metrics);
    progress_.record(metrics, options_.steps);
  }

  void finish() {
    summary_.seconds = since(start_);
    summary_.seconds_per_step = step_seconds_ / static_cast<double>(std::max<std::int64_t>(summary_.steps, 1));
    records_.write_summary(summary_);
    progress_.finish(summary_);
  }

  const Options& options_;
  torch::Device device_;
  Images train_;
  Images test_;
  Images probe_;
  Normalization normalization_;
  Records& records_;
  Progress& progress_;
  DataOrder order_;
  std::shared_ptr<ImageClassifier> model_;
  Step step_;
  RunningMean loss_;
  RunningMean penalty_;
  Summary summary_;
  double step_seconds_ = 0;
  Clock::time_point start_;
};

}  // namespace

Summary train(const Options& options, Progress& progress) {
  validate(options);
  const torch::Device device = device_of(options.device);
  if (options.threads > 0) {
    torch::set_num_threads(options.threads);
  }
  Data data = load_data(options);
  Options resolved = options;
  resolved.train_size = data.train.size();
  resolved.test_size = data.test.size();
  Records records(options.output, options.overwrite);
  records.write_config(resolved, device.str(), torch::get_num_threads());
  for (const std::string& note : data.notes) {
    progress.say("note: " + note);
  }
  progress.say(fmt::format("{} on {}: {} training and {} test images of {}x{}, {} classes",
                           name_of(architecture_names, options.model),
                           options.data == "synthetic" ? "synthetic images" : name_of(dataset_names, options.dataset),
                           data.train.size(), data.test.size(), options.image_size, options.image_size, data.classes));
  progress.say(
      fmt::format("{}, strength {}, batch {} in micro-batches of {}, learning rate {}, seed {}, {}, {} threads",
                  name_of(method_names, options.method), options.strength, options.batch_size, options.micro_batch_size,
                  options.learning_rate, options.seed, device.str(), torch::get_num_threads()));
  return Run(resolved, device, data, records, progress)();
}

}  // namespace cifar
