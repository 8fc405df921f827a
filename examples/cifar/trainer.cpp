#include "trainer.hpp"

#include <fmt/format.h>

#include <microreg/distributed/shard.hpp>
#include <microreg/error.hpp>

#include <algorithm>
#include <chrono>
#include <optional>
#include <utility>

#include "atomic_file.hpp"
#include "augmentation.hpp"
#include "checkpoint.hpp"
#include "checksum.hpp"
#include "data.hpp"
#include "data_order.hpp"
#include "device.hpp"
#include "evaluation.hpp"
#include "methods.hpp"
#include "models.hpp"
#include "random_streams.hpp"
#include "recorded_norms.hpp"
#include "run_state.hpp"
#include "signals.hpp"

namespace cifar {

namespace {

constexpr std::int64_t probe_micro_batches = 16;

Images on(const Images& images, torch::Device device) { return {images.pixels.to(device), images.labels.to(device)}; }

std::shared_ptr<ImageClassifier> make_trained_model(const Options& options, const Data& data, torch::Device device) {
  torch::manual_seed(stream_seed(options.seed, Stream::weights));
  // Made on the CPU, so that the weights are the same on every device.
  auto model =
      make_model(options.model, {.classes = data.classes, .image_size = options.image_size, .width = options.width});
  model->to(device);
  if (options.layout == Layout::channels_last) {
    for (torch::Tensor& parameter : model->parameters()) {
      if (parameter.dim() == 4) {
        parameter.set_data(parameter.contiguous(torch::MemoryFormat::ChannelsLast));
      }
    }
  }
  return model;
}

class Run {
 public:
  Run(const Options& options, torch::Device device, const Data& data, std::string config, Records& records,
      Progress& progress, std::shared_ptr<microreg::Communicator> ranks)
      : options_(options),
        ranks_(std::move(ranks)),
        device_(device),
        train_(on(data.train, device)),
        validation_(on(data.validation, device)),
        test_(data.test),
        normalization_(data.normalization),
        config_(std::move(config)),
        records_(records),
        progress_(progress),
        checkpoints_(options.output),
        order_(data.train.size(), options.batch_size, options.seed) {
    state_.model = make_trained_model(options, data, device);
    state_.optimizer = std::make_shared<torch::optim::SGD>(state_.model->parameters(), options.learning_rate);
    step_.emplace(options, state_.model, state_.optimizer, ranks_);
  }

  /// Goes on from the newest checkpoint that is whole, which rank 0 reads.
  void resume() {
    if (!is_first()) {
      if (const std::string bytes = shared(""); !bytes.empty()) {
        restore(state_, bytes);
        leave_sums_to_first();
      }
      return;
    }
    std::vector<std::string> notes;
    const auto loaded = checkpoints_.load(notes);
    for (const std::string& note : notes) {
      progress_.say("note: " + note);
    }
    if (!loaded.has_value()) {
      progress_.say(
          fmt::format("note: there is no checkpoint in {}: this run begins at the beginning", options_.output));
      records_.rewind(0);
      static_cast<void>(shared(""));
      return;
    }
    check_same_run(config_in(loaded->bytes), config_, options_);
    restore(state_, shared(loaded->bytes));
    records_.rewind(state_.metrics_bytes);
    progress_.say(fmt::format("resumed from step {} ({})", state_.step, loaded->path.string()));
  }

  Summary operator()() {
    start_ = Clock::now();
    earlier_seconds_ = state_.summary.seconds;
    first_step_ = state_.step;
    records_.begin(config_);
    if (!options_.resume && !options_.output.empty()) {
      checkpoints_.remove();  // Another run's, which --overwrite replaces.
    }
    save();  // Proves, before hours are spent, that there is room for a checkpoint.
    const StopSignals signals;
    try {
      while (state_.step < options_.steps && !stopped()) {
        train_step();
        progress_.step(state_.step, options_.steps);
        if (state_.step % options_.log_every == 0 || state_.step == options_.steps) {
          record();
        }
        if (options_.checkpoint_every > 0 && state_.step % options_.checkpoint_every == 0) {
          save();
        }
      }
    } catch (const microreg::NonFiniteError& error) {
      state_.summary.status = "diverged";
      state_.summary.message = error.what() + last_checkpoint();
      finish();
      throw microreg::NonFiniteError(state_.summary.message, error.micro_batch());
    } catch (const microreg::RankError& error) {
      throw microreg::RankError(fmt::format("{} (after step {}{})", error.what(), state_.step, last_checkpoint()),
                                error.ranks());
    }
    if (state_.step != saved_step_) {
      save();
    }
    if (state_.step < options_.steps) {
      state_.summary.status = "interrupted";
      state_.summary.signal = signal_;
      state_.summary.message =
          fmt::format("stopped by signal {} after step {}{}", signal_, state_.step, last_checkpoint());
      progress_.say(state_.summary.message);
    } else {
      test();
    }
    finish();
    return state_.summary;
  }

 private:
  using Clock = std::chrono::steady_clock;

  [[nodiscard]] static double since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
  }
  [[nodiscard]] double seconds() const { return earlier_seconds_ + since(start_); }

  [[nodiscard]] bool is_first() const { return ranks_ == nullptr || ranks_->rank() == 0; }

  /// Whether a signal has come, on whatever rank: all of them stop after the same step.
  bool stopped() {
    signal_ = StopSignals::received();
    if (ranks_ != nullptr) {
      const double own[] = {static_cast<double>(signal_), signal_ == 0 ? 0.0 : 1.0};
      const torch::Tensor all = torch::tensor({own[0], own[1]}, torch::kFloat64);
      ranks_->all_reduce(all)();
      const double count = all[1].item<double>();
      signal_ = signal_ != 0 || count == 0 ? signal_ : static_cast<int>(all[0].item<double>() / count);
    }
    return signal_ != 0;
  }

  /// The bytes that rank 0 has.
  [[nodiscard]] std::string shared(std::string bytes) const {
    if (ranks_ != nullptr) {
      torch::Tensor size = torch::full({1}, static_cast<std::int64_t>(bytes.size()), torch::kInt64);
      ranks_->broadcast(size, 0);
      bytes.resize(static_cast<std::size_t>(size.item<std::int64_t>()));
      if (!bytes.empty()) {
        ranks_->broadcast(torch::from_blob(bytes.data(), {static_cast<std::int64_t>(bytes.size())}, torch::kUInt8), 0);
      }
    }
    return bytes;
  }

  void leave_sums_to_first() {
    for (RunningMean* mean : {&state_.loss, &state_.gradient_norm, &state_.penalty}) {
      mean->sum = mean->sum.defined() ? torch::zeros_like(mean->sum) : mean->sum;
    }
  }

  void gather_sums() {
    for (RunningMean* mean : {&state_.loss, &state_.gradient_norm, &state_.penalty}) {
      if (ranks_ != nullptr) {
        mean->gather(*ranks_);
      }
    }
  }

  [[nodiscard]] std::string last_checkpoint() const {
    return options_.output.empty() ? "; nothing was saved: give --output DIR to be able to go on"
                                   : fmt::format(
                                         "; the last checkpoint is {} (step {}): the same command with --resume "
                                         "goes on from there",
                                         checkpoints_.last().string(), saved_step_);
  }

  void train_step() {
    const auto begin = Clock::now();
    const std::int64_t step = state_.step;
    const std::uint64_t seed = stream_seed(options_.seed, Stream::step, step);
    torch::manual_seed(ranks_ == nullptr ? seed : microreg::rank_seed(seed, *ranks_));
    const torch::Tensor whole = order_.batch(step);
    const auto mine = ranks_ == nullptr ? microreg::Shard{0, whole.size(0)}
                                        : microreg::shard(whole.size(0), options_.micro_batch_size, *ranks_);
    const torch::Tensor indices = sent_to(device_, whole.narrow(0, mine.begin, mine.size));
    torch::Tensor pixels = train_.pixels.index_select(0, indices);
    if (options_.augment) {
      const std::int64_t padding = options_.image_size / 8;  // 4 at the full size, as usual
      const auto generator = stream_generator(device_, options_.seed, Stream::augmentation, step);
      CropAndFlip draw = draw_crop_and_flip(whole.size(0), padding, generator);  // as one process draws it
      for (torch::Tensor* each : {&draw.top, &draw.left, &draw.flip}) {
        *each = each->narrow(0, mine.begin, mine.size);
      }
      pixels = crop_and_flip(pixels, padding, draw);
    }
    const std::uint64_t bytes = ranks_ == nullptr ? 0 : ranks_->bytes();
    const microreg::Report report =
        (*step_)(step, network_input(pixels, normalization_, options_.layout), train_.labels.index_select(0, indices));
    step_bytes_ += ranks_ == nullptr ? 0 : ranks_->bytes() - bytes;
    const double share = ranks_ == nullptr ? 1 : report.share;
    state_.loss.add(report.loss * share);
    state_.gradient_norm.add(report.gradient_norm * (is_first() ? 1 : 0));
    state_.penalty.add(report.penalties.front().value * (report.penalties.front().strength * share));
    state_.step_seconds += since(begin);
    ++state_.step;
  }

  /// Training images to measure on. By default the same ones throughout the run, and for every method: what is compared
  /// is the network.
  [[nodiscard]] Images measured_images() const {
    const std::int64_t count = std::min(train_.size(), probe_micro_batches * options_.micro_batch_size);
    const std::int64_t index = options_.monitor_on == MonitorOn::fresh ? state_.step : 0;
    const torch::Tensor order = torch::randperm(
        train_.size(), stream_generator(torch::kCPU, options_.seed, Stream::probe, index), torch::kInt64);
    const torch::Tensor chosen = sent_to(device_, order.narrow(0, 0, count));
    return {train_.pixels.index_select(0, chosen), train_.labels.index_select(0, chosen)};
  }

  void record() {
    const std::vector<double> penalties =
        measured_penalties(state_.model, measured_images(), normalization_, options_.micro_batch_size, options_.workers,
                           options_.monitors, options_.layout, ranks_);
    gather_sums();
    Metrics metrics{.step = state_.step,
                    .train_loss = state_.loss.take(),
                    .accuracy = accuracy(*state_.model, validation_, normalization_, options_.layout, ranks_.get()),
                    .micro_batch_gradient_norm = penalties.front(),
                    .gradient_norm = state_.gradient_norm.take(),
                    .penalty = state_.penalty.take(),
                    .seconds = seconds()};
    for (std::size_t i = 0; i < options_.monitors.size(); ++i) {
      metrics.monitors.emplace_back(field_name(name_of(monitor_names, options_.monitors[i])), penalties[i + 1]);
    }
    Summary& summary = state_.summary;
    if (state_.best.empty() || metrics.accuracy > summary.best_accuracy) {
      summary.best_accuracy = metrics.accuracy;
      summary.best_step = state_.step;
      state_.best = copies_of(*state_.model);
    }
    summary.final_accuracy = metrics.accuracy;
    records_.append(metrics);
    progress_.record(metrics, options_.steps);
  }

  void save() {
    gather_sums();
    if (options_.output.empty()) {
      saved_step_ = state_.step;
      return;
    }
    state_.metrics_bytes = records_.sync();
    state_.summary.seconds = seconds();
    checkpoints_.save(state_.step, serialized(state_, config_));
    saved_step_ = state_.step;
  }

  /// The test accuracy of the checkpoint that was best on the validation images.
  void test() {
    const std::vector<torch::Tensor> tensors = tensors_of(*state_.model);
    state_.summary.weights_checksum = fmt::format("{:016x}", fnv1a(tensors));
    copy_tensors(tensors, state_.best);
    state_.summary.test_accuracy =
        accuracy(*state_.model, on(test_, device_), normalization_, options_.layout, ranks_.get());
  }

  void finish() {
    state_.summary.steps = state_.step;
    state_.summary.seconds = seconds();
    state_.summary.seconds_per_step = state_.step_seconds / static_cast<double>(std::max<std::int64_t>(state_.step, 1));
    records_.write_summary(state_.summary);
    if (ranks_ != nullptr) {
      progress_.say(fmt::format("each of {} ranks handed over {:.3g} bytes a step", ranks_->size(),
                                static_cast<double>(step_bytes_) /
                                    static_cast<double>(std::max<std::int64_t>(state_.step - first_step_, 1))));
    }
    progress_.finish(state_.summary);
  }

  const Options& options_;
  std::shared_ptr<microreg::Communicator> ranks_;
  torch::Device device_;
  Images train_;
  Images validation_;
  const Images& test_;
  Normalization normalization_;
  std::string config_;
  Records& records_;
  Progress& progress_;
  Checkpoints checkpoints_;
  DataOrder order_;
  RunState state_;
  std::optional<Step> step_;
  Clock::time_point start_;
  double earlier_seconds_ = 0;
  std::int64_t saved_step_ = 0;
  int signal_ = 0;
  std::uint64_t step_bytes_ = 0;  ///< of this rank, since first_step_
  std::int64_t first_step_ = 0;
};

}  // namespace

Summary train(const Options& options, Progress& progress, const std::shared_ptr<microreg::Communicator>& ranks) {
  validate(options);
  if (ranks != nullptr && ranks->rank() != 0) {
    progress = Progress(nullptr);
  }
  const torch::Device device = device_of(options.device);
  if (options.threads > 0) {
    torch::set_num_threads(options.threads);
  }
  choose_kernels_by_trial(device);
  const Data data = load_data(options);
  Options resolved = options;
  resolved.workers = resolved_workers(options, device.is_cpu(), torch::get_num_threads());
  resolved.train_size = data.train.size();
  resolved.validation_size = options.split == Split::holdout ? data.validation.size() : 0;
  resolved.test_size = data.test.size();
  resolved.output = ranks == nullptr || ranks->rank() == 0 ? options.output : "";
  Records records(resolved);
  for (const std::string& note : data.notes) {
    progress.say("note: " + note);
  }
  progress.say(fmt::format("{} on {}: {} training, {} validation and {} test images of {}x{}, {} classes; {}",
                           name_of(architecture_names, options.model),
                           options.data == "synthetic" ? "synthetic images" : name_of(dataset_names, options.dataset),
                           resolved.train_size, resolved.validation_size, resolved.test_size, options.image_size,
                           options.image_size, data.classes, description(device, options.layout)));
  if (options.split == Split::reference && options.data != "synthetic") {
    progress.say(
        "note: with --split reference the best checkpoint is chosen on the test images, as in the authors' code; that "
        "flatters its test accuracy");
  }
  progress.say(fmt::format(
      "{}, strength {}, batch {} in micro-batches of {}, learning rate {}, seed {}, {} threads{}",
      name_of(method_names, options.method), options.strength, options.batch_size, options.micro_batch_size,
      options.learning_rate, options.seed, torch::get_num_threads(),
      (resolved.workers > 0 ? fmt::format(", {} workers{}", resolved.workers,
                                          options.estimator == EstimatorName::exact ? "" : " (but for displacements)")
                            : "") +
          (ranks == nullptr ? "" : fmt::format(", {} ranks", ranks->size()))));
  if (options.method == Method::external_grafting) {
    const std::int64_t recorded = RecordedNorms(options.norms_from).steps();
    progress.say(fmt::format("gradient norms of {}, {} steps{}", options.norms_from, recorded,
                             recorded < options.steps ? "; the last one stands for all steps behind" : ""));
  }
  Run run(resolved, device, data,
          Records::config(resolved, device.str(), torch::get_num_threads(), ranks == nullptr ? 1 : ranks->size()),
          records, progress, ranks);
  if (options.resume) {
    run.resume();
  }
  return run();
}

}  // namespace cifar
