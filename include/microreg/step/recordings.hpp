/// @file
/// The work of micro-batches, recorded once for each shape and repeated on other samples and weights.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/Device.h>
#include <microreg/detail/finite.hpp>
#include <microreg/detail/plain_tensors.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/step/call_watch.hpp>
#include <microreg/step/exact.hpp>
#include <microreg/step/fresh_accumulators.hpp>
#include <microreg/step/gradients.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/own_draws.hpp>
#include <microreg/step/probes.hpp>
#include <microreg/step/replay.hpp>
#include <microreg/step/snapshot.hpp>
#include <microreg/step/tensor_lists.hpp>
#include <microreg/step/visitor.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// What was recorded. It reads and writes the memory that it did then.
class Recording {
 public:
  Recording() = default;
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;
  virtual ~Recording() = default;

  virtual void replay() = 0;
};

/// What a recording stands for: shapes, types and places of all tensors, and the switches that decide which kernels
/// run.
struct RecordingKey {
  std::vector<std::int64_t> numbers;
  std::string paths;

  friend bool operator==(const RecordingKey&, const RecordingKey&) = default;

  void add(std::int64_t number) { numbers.push_back(number); }
  void add(const void* place) { numbers.push_back(static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(place))); }
  void add_layout(const at::Tensor& tensor) {
    add(static_cast<std::int64_t>(tensor.scalar_type()));
    add(static_cast<std::int64_t>(tensor.device().type()));
    add(tensor.device().index());
    add(tensor.requires_grad() ? 1 : 0);
    add(tensor.dim());
    for (std::int64_t i = 0; i < tensor.dim(); ++i) {
      add(tensor.size(i));
      add(tensor.stride(i));
    }
  }
  void add_place(const at::Tensor& tensor) {
    add_layout(tensor);
    add(tensor.unsafeGetTensorImpl());
    add(tensor.const_data_ptr());
  }
};

/// One micro-batch's work on memory of its own, which is done again by recording it.
class RecordedWork {
 public:
  RecordedWork(const ExactTask& task, const MiniBatch& batch, const Part& part, const Weights& weights)
      : batch_(batch.copied(part)),
        part_{.index = part.index, .count = part.count, .begin = 0, .size = part.size, .weight = part.weight},
        parameters_(task.parameters),
        task_{parameters_, task.range, task.with_loss_gradient},
        penalised_(weights.penalty != 0) {
    const at::NoGradGuard no_grad;
    const at::TensorOptions scalar =
        at::TensorOptions().dtype(at::kDouble).device(parameters_.tensors.front().device());
    scalars_.push_back(at::empty({}, scalar));
    for (const double strength : weights.strengths) {
      strengths_.push_back(strength > 0 ? 1 : 0);
      scalars_.push_back(at::empty({}, scalar));
    }
    batch_->for_each_tensor_of(
        part_, [&](const at::Tensor& tensor, const std::string& /*path*/) { inputs_.push_back(tensor); });
  }

  /// Takes the samples and weights of another micro-batch of the same key.
  void set(const MiniBatch& batch, const Part& part, const Weights& weights) {
    const at::NoGradGuard no_grad;
    std::size_t i = 0;
    batch.for_each_tensor_of(part, [&](const at::Tensor& tensor, const std::string& /*path*/) {
      inputs_[i++].detach().copy_(tensor, /*non_blocking=*/true);
    });
    scalars_.front().fill_(weights.loss);
    for (std::size_t term = 0; term < strengths_.size(); ++term) {
      scalars_[term + 1].fill_(weights.strengths[term] * weights.penalty);
    }
  }

  /// To be recorded.
  void operator()() {
    std::mutex calling;
    Calls calls(calling);
    const auto keep = [&](const Evaluation& evaluation) {
      loss = evaluation.loss.detach();
      loss_parts = evaluation.loss_parts;
      outputs = evaluation.outputs;
    };
    const auto nothing = [](const Evaluation&, const std::vector<std::vector<at::Tensor>>&, bool) {};
    estimated = exact_estimate(task_, *batch_, part_, Weights{1, penalised_ ? 1.0 : 0.0, strengths_, &scalars_},
                               Visitor{calls, [] {}, keep, nothing});
  }

  // What the last pass, or the last replay, has left.
  at::Tensor loss;
  std::vector<at::Tensor> loss_parts;
  std::vector<at::Tensor> outputs;
  Estimated estimated;

  RecordingKey key;
  std::unique_ptr<Recording> recording;
  std::int64_t replays = 0;  ///< since it was last compared
  std::int64_t used = 0;     ///< when

 private:
  std::unique_ptr<MiniBatch> batch_;
  Part part_;
  Parameters parameters_;
  ExactTask task_;
  bool penalised_;
  std::vector<double> strengths_;
  std::vector<at::Tensor> scalars_;
  std::vector<at::Tensor> inputs_;
};

/// The name of the operation that this thread began last, of those that are not a part of another.
class LastOperation final : public CallWatch<LastOperation> {
 public:
  static constexpr bool needs_inputs = false;

  LastOperation() : CallWatch(true) {}
  [[nodiscard]] const std::string& name() const noexcept { return name_; }

 private:
  friend class CallWatch<LastOperation>;
  void note(const at::RecordFunction& function) {
    if (depth_++ == 0) {
      name_ = function.name();
    }
  }
  void note_end(const at::RecordFunction& /*function*/) { --depth_; }

  std::string name_;
  int depth_ = 0;
};

/// Does micro-batches of `.micro_batch_size` samples by recordings, all others operation by operation.
///
/// A recording repeats kernels, not the program that started them: what the model reads on the host (a switch, a
/// schedule, a counter) stays what it was. So each is compared with the same micro-batch done operation by operation
/// when it is made, and again every so many replays, from the same random numbers and buffers.
class Recordings : public Replay {
 public:
  struct Settings {
    std::int64_t shapes;       ///< the most that are kept; what comes then is not recorded
    std::int64_t check_every;  ///< replays of one; 0: only when it is made
    double tolerance;          ///< of the gradient; 0: by its type
  };

  explicit Recordings(Settings settings) : settings_(settings) {}

  [[nodiscard]] Estimated estimate(const ExactTask& task, MiniBatch& batch, const Part& part, const Weights& weights,
                                   const Visitor& visitor, const Snapshot& beginning) override {
    const std::lock_guard lock(mutex_);
    const RecordingTraits traits = batch.traits();
    require(task, batch, traits);
    ++now_;
    at::Tensor loss;
    const auto keep = [&](Evaluation& evaluation) {
      if (evaluation.count.has_value()) {
        throw ModelError(
            "the loss returns a CountedLoss, whose count decides on the host what a micro-batch weighs, and cuda_graph "
            "is set; return the mean, or leave cuda_graph empty");
      }
      loss = evaluation.loss.detach();
      visitor.keep(evaluation);
    };
    const auto eager = [&] {
      return exact_estimate(task, batch, part, weights, {visitor.calls, visitor.begin, keep, visitor.go_on});
    };
    if (batch.memory()->first || part.size != traits.micro_batch_size) {
      return eager();
    }
    RecordingKey key = key_of(task, batch, part, weights, traits);
    const auto found = std::find_if(works_.begin(), works_.end(), [&](const auto& work) { return work->key == key; });
    RecordedWork* work = found == works_.end() ? nullptr : found->get();
    if (work == nullptr && !has_room()) {
      return eager();
    }
    if (work != nullptr && (settings_.check_every == 0 || work->replays < settings_.check_every)) {
      work->set(batch, part, weights);
      replay(*work);
      return taken(*work, visitor);
    }

    // This micro-batch is done in both ways, from the same state, and goes on with what came operation by operation.
    const Snapshot before = beginning.buffers_now();
    Estimated estimated = eager();
    if (!all_finite(loss, estimated)) {
      return estimated;  // nothing can be compared with it
    }
    const Snapshot after = beginning.buffers_now();
    OwnDraws::around([&] {
      try {
        before.restore();
        std::unique_ptr<RecordedWork> made;
        if (work == nullptr) {
          made = recorded(task, batch, part, weights, traits);
          made->key = std::move(key);
          before.restore();
        }
        RecordedWork& repeated = made != nullptr ? *made : *work;
        repeated.set(batch, part, weights);
        replay(repeated);
        require_alike(loss, estimated, repeated);
        repeated.replays = 0;
        if (made != nullptr) {
          works_.push_back(std::move(made));
        }
        after.restore();
      } catch (...) {
        after.restore_after_error();  // as if it had been done once
        throw;
      }
    });
    return estimated;
  }

  /// How many shapes are recorded, and how many micro-batches were done by replays.
  [[nodiscard]] std::int64_t recordings() const {
    const std::lock_guard lock(mutex_);
    return static_cast<std::int64_t>(works_.size());
  }
  [[nodiscard]] std::int64_t replays() const {
    const std::lock_guard lock(mutex_);
    return replays_;
  }
  /// Forgets all recordings, and lets their memory go.
  void reset() {
    const std::lock_guard lock(mutex_);
    works_.clear();
  }

 protected:
  /// Throws OptionError where nothing on this device can be recorded.
  virtual void require_device(c10::Device device) const = 0;
  /// Calls `work` as often as it likes, the last time to record it.
  /// `generators`: that the work may draw from, beside LibTorch's own.
  [[nodiscard]] virtual std::unique_ptr<Recording> record(const std::function<void()>& work,
                                                          const std::vector<at::Generator>& generators) = 0;

 private:
  /// While it lives, autocast makes each cast anew: one kept from before would be of the weights of then.
  class NoCastsKept {
   public:
    NoCastsKept() : before_(at::autocast::is_autocast_cache_enabled()) {
      at::autocast::clear_cache();
      at::autocast::set_autocast_cache_enabled(false);
    }
    NoCastsKept(const NoCastsKept&) = delete;
    NoCastsKept& operator=(const NoCastsKept&) = delete;
    ~NoCastsKept() { at::autocast::set_autocast_cache_enabled(before_); }

   private:
    bool before_;
  };

  void require(const ExactTask& task, MiniBatch& batch, const RecordingTraits& traits) const {
    if (traits.owner == nullptr) {
      throw OptionError("cuda_graph is set where passes are not a Regularizer's own; leave it empty");
    }
    require_device(task.parameters.tensors.front().device());
    if (task.range.narrow || !task.range.scale.is_one()) {
      throw OptionError(
          "cuda_graph is set where gradients are in float16 or a loss_scale is, whose factors change from step to "
          "step; use bfloat16, or leave cuda_graph empty");
    }
    if (!batch.memory()->written.empty()) {
      throw ModelError(
          "the forward pass writes to parameters (an Embedding's max_norm), and cuda_graph repeats passes from the "
          "same state; renormalise between the steps, or leave cuda_graph empty");
    }
  }

  /// Whether one more may be made, for which one makes room that nobody has needed for a thousand micro-batches: of
  /// parameters that lie elsewhere now, or of an earlier phase.
  bool has_room() {
    if (static_cast<std::int64_t>(works_.size()) < settings_.shapes) {
      return true;
    }
    return std::erase_if(works_, [&](const auto& work) { return work->used + 1000 < now_; }) > 0;
  }

  std::unique_ptr<RecordedWork> recorded(const ExactTask& task, const MiniBatch& batch, const Part& part,
                                         const Weights& weights, const RecordingTraits& traits) {
    auto made = std::make_unique<RecordedWork>(task, batch, part, weights);
    made->set(batch, part, weights);
    std::vector<at::Generator> generators;
    if (traits.generator.has_value()) {
      generators.push_back(*traits.generator);
    }
    const NoCastsKept fresh;
    const FreshAccumulators apart(task.parameters.tensors);
    const LastOperation last;
    try {
      made->recording = record([&work = *made] { work(); }, generators);
    } catch (const Error&) {
      throw;
    } catch (const c10::OutOfMemoryError&) {
      throw;
    } catch (const std::exception& error) {
      throw ModelError(text(
          {"this micro-batch cannot be recorded as a CUDA graph: ", sentence_of(error), " (at or behind ", last.name(),
           "); take out what waits for the device (item(), indexing by a mask, a copy to the host), or "
           "leave cuda_graph empty"}));
    }
    return made;
  }

  static RecordingKey key_of(const ExactTask& task, const MiniBatch& batch, const Part& part, const Weights& weights,
                             const RecordingTraits& traits) {
    RecordingKey key;
    key.add(traits.owner);
    batch.for_each_tensor_of(part, [&](const at::Tensor& tensor, const std::string& path) {
      if (tensor.grad_fn() != nullptr) {
        throw ModelError(
            text({path,
                  " carries a graph, which a recording does not repeat; detach() it, compute it inside the "
                  "model, or leave cuda_graph empty"}));
      }
      key.add_layout(tensor);
      key.paths += path + '\n';
    });
    for (const at::Tensor& tensor : task.parameters.tensors) {
      key.add_place(tensor);
    }
    for (const std::size_t i : task.parameters.selected) {
      key.add(static_cast<std::int64_t>(i));
    }
    for (const at::Tensor& tensor : batch.buffers()) {
      key.add_place(tensor);
    }
    for (const bool training : traits.training) {
      key.add(training ? 1 : 0);
    }
    key.add(weights.penalty != 0 ? 1 : 0);
    for (const double strength : weights.strengths) {
      key.add(strength > 0 ? 1 : 0);
    }
    const c10::DeviceType device = task.parameters.tensors.front().device().type();
    const at::Context& context = at::globalContext();
    key.add(at::autocast::is_autocast_enabled(device) ? 1 : 0);
    key.add(static_cast<std::int64_t>(at::autocast::get_autocast_dtype(device)));
    for (const bool on : {context.allowTF32CuDNN(), context.allowTF32CuBLAS(), context.deterministicAlgorithms(),
                          context.userEnabledCuDNN(), task.with_loss_gradient}) {
      key.add(on ? 1 : 0);
    }
    return key;
  }

  void replay(RecordedWork& work) {
    OwnDraws::around([&] { work.recording->replay(); });
    work.used = now_;
    ++work.replays;
    ++replays_;
  }

  /// What the replay has left, with copies of what outlives the next one.
  static Estimated taken(RecordedWork& work, const Visitor& visitor) {
    const at::NoGradGuard no_grad;
    Replayed evaluation;
    evaluation.loss = work.loss.clone();
    evaluation.loss_parts = copies_of(work.loss_parts);
    evaluation.outputs = copies_of(work.outputs);
    visitor.begin();
    visitor.keep(evaluation);
    Estimated result = work.estimated;  // whose gradients are added up before the next replay
    result.squared_norms = copies_of(result.squared_norms);
    result.replayed = true;
    return result;
  }

  /// A pass without a graph.
  class Replayed final : public Evaluation {
   public:
    [[nodiscard]] std::vector<at::Tensor> probes(std::size_t /*term*/, Draws* /*draws*/) const override { return {}; }
  };

  static std::vector<at::Tensor> copies_of(const std::vector<at::Tensor>& tensors) {
    std::vector<at::Tensor> result;
    for (const at::Tensor& tensor : tensors) {
      result.push_back(tensor.clone());
    }
    return result;
  }

  static std::vector<at::Tensor> sum_of(const Estimated& estimated) {
    if (estimated.gradients.empty()) {
      return {};
    }
    std::vector<at::Tensor> sum(estimated.gradients.front().tensors.size());
    add_scaled(sum, estimated.gradients);
    return defined(sum);
  }

  static bool all_finite(const at::Tensor& loss, const Estimated& estimated) {
    return is_finite(loss.item<double>()) && is_finite(norm_of(sum_of(estimated))) &&
           is_finite(norm_of(estimated.squared_norms));
  }

  [[nodiscard]] double tolerance(const at::Tensor& gradient, const at::Tensor& loss) const {
    if (settings_.tolerance > 0) {
      return settings_.tolerance;
    }
    const c10::DeviceType device = gradient.device().type();
    const bool half = at::autocast::is_autocast_enabled(device) || loss.scalar_type() == at::kBFloat16 ||
                      gradient.scalar_type() == at::kBFloat16;
    const bool tf32 =
        gradient.is_cuda() && (at::globalContext().allowTF32CuDNN() || at::globalContext().allowTF32CuBLAS());
    return half ? 0.05 : tf32 ? 0.01 : gradient.scalar_type() == at::kDouble ? 1e-9 : 1e-3;
  }

  void require_alike(const at::Tensor& loss, const Estimated& estimated, const RecordedWork& work) const {
    const at::NoGradGuard no_grad;
    const auto apart = [](double difference, double size) {
      return !is_finite(difference) ? unbounded() : difference == 0 ? 0 : size > 0 ? difference / size : 1;
    };
    const std::vector<at::Tensor> own = sum_of(estimated), repeated = sum_of(work.estimated);
    double error = own.size() == repeated.size() ? apart(norm_of(differences(own, repeated)), norm_of(own)) : 1;
    error = std::max(error, apart((loss - work.loss).abs().item<double>(), std::abs(loss.item<double>())));
    for (std::size_t i = 0; i < estimated.squared_norms.size(); ++i) {
      const double norm = estimated.squared_norms[i].sqrt().item<double>();
      error = std::max(error, apart(std::abs(work.estimated.squared_norms[i].sqrt().item<double>() - norm), norm));
    }
    const double limit = own.empty() ? 0 : tolerance(own.front(), loss);
    if (exceeds(error, limit)) {
      throw ModelError(text(
          {"what the CUDA graph repeats is ", 100 * error, " % off the same micro-batch done operation by operation (",
           100 * limit,
           " % are allowed): model, loss or a penalty reads something that is not in the recording (a value on the "
           "host, such as a schedule, a counter or a switch; a generator of its own); leave cuda_graph empty, or "
           "call its reset() whenever that changes"}));
    }
  }

  Settings settings_;
  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<RecordedWork>> works_;
  std::int64_t replays_ = 0;
  std::int64_t now_ = 0;  ///< counts micro-batches
};

}  // namespace microreg::inline MICROREG_ABI::detail
