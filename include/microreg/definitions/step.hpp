/// @file
/// The step: the loop over micro-batches, its report, and the promise that nothing is left behind by a failed one.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/UndefinedTensorImpl.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/variable.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/finite.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/fused/scope.hpp>
#include <microreg/gates/watched.hpp>
#include <microreg/options.hpp>
#include <microreg/parameters.hpp>
#include <microreg/report.hpp>
#include <microreg/step/active_steps.hpp>
#include <microreg/step/differences.hpp>
#include <microreg/step/double_backward.hpp>
#include <microreg/step/graph.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/objective.hpp>
#include <microreg/step/own_draws.hpp>
#include <microreg/step/probes.hpp>
#include <microreg/step/ranks.hpp>
#include <microreg/step/recurrent.hpp>
#include <microreg/step/sampling.hpp>
#include <microreg/step/scaling.hpp>
#include <microreg/step/side_by_side.hpp>
#include <microreg/step/snapshot.hpp>
#include <microreg/step/tensor_lists.hpp>
#include <microreg/step/turns.hpp>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

MICROREG_INLINE void check_output(const at::Tensor& output) {
  if (output.defined() && !output.is_floating_point() && !output.is_complex()) {
    throw ModelError(text({"the model's output is ", output.scalar_type(), " of shape ", output.sizes(),
                           ", which has no gradient; return floating-point logits or predictions"}));
  }
}

MICROREG_INLINE at::Tensor checked_loss(const at::Tensor& value, Reduction reduction, std::int64_t size) {
  if (!value.defined() || value.numel() != 1) {
    throw ModelError(text({"the loss has shape ", value.defined() ? Piece(value.sizes()) : Piece("(undefined)"),
                           ", it must be a scalar: reduce it to the mean over samples, or to the sum with .reduction = "
                           "Reduction::sum"}));
  }
  if (!value.is_floating_point() || !value.requires_grad()) {
    throw ModelError(text({"the loss (", value.scalar_type(),
                           ") carries no graph; compute it from the model's output without detach(), NoGradGuard or "
                           "InferenceMode (and for a micro-batch that has nothing to learn from, return 0 * "
                           "output.sum())"}));
  }
  const at::Tensor scalar = value.dim() == 0 ? value : value.reshape({});
  return reduction == Reduction::mean ? scalar : scalar / size;
}

MICROREG_INLINE void take_loss(Evaluation& evaluation, LossValue loss, Reduction reduction, std::int64_t size) {
  evaluation.loss = checked_loss(loss.value, loss.count.has_value() ? Reduction::mean : reduction, size);
  evaluation.count = loss.count;
  evaluation.loss_parts = std::move(loss.parts);
}

MICROREG_INLINE void throw_changed_output(const std::string& who) {
  throw ModelError(text({who,
                         " reads the model's output, which the loss has changed in place: use the operation out of "
                         "place there, or clone() first"}));
}

MICROREG_INLINE void require_loss_alone(const std::vector<at::Tensor>& probes, const at::Tensor& loss,
                                        const std::string& who) {
  if (std::any_of(probes.begin(), probes.end(), [&](const at::Tensor& probe) { return !probe.is_same(loss); })) {
    throw_changed_output(who);
  }
}

MICROREG_INLINE void add_parameters_of_loss(const torch::nn::Module& loss, std::vector<NamedParameter>& parameters) {
  for (auto& [name, tensor] : named_parameters_of(loss)) {
    parameters.push_back({"loss." + name, tensor});
  }
}

MICROREG_INLINE void add_buffers_of_loss(const torch::nn::Module& loss, std::vector<at::Tensor>& buffers) {
  const std::vector<at::Tensor> own = loss.buffers();
  buffers.insert(buffers.end(), own.begin(), own.end());
}

MICROREG_INLINE LossValue mean_of(const CountedLoss& loss) {
  if (!loss.sum.defined() || !loss.count.defined() || loss.count.numel() != 1) {
    throw ModelError("a CountedLoss needs a sum and a count, each a tensor of one value");
  }
  const double count = loss.count.detach().to(at::kCPU, at::kDouble).item<double>();
  if (!is_finite(count) || count < 0) {
    throw ModelError(text({"the count of the loss is ", count, "; it must be a finite number, at least 0"}));
  }
  return {count > 0 ? loss.sum / count : loss.sum, {}, count};
}

MICROREG_INLINE std::vector<Part> cut(std::int64_t inputs, std::int64_t targets, const RegularizerOptions& options) {
  if (targets >= 0 && inputs != targets) {
    throw BatchError(text({"first dimensions differ: input has ", inputs, " samples, target has ", targets,
                           "; pass the inputs and targets of the same samples"}));
  }
  if (inputs == 0 && options.communicator != nullptr) {
    return {};  // other ranks have some
  }
  if (inputs == 0) {
    throw BatchError("the mini-batch is empty: input has 0 samples; skip empty batches in the data loader");
  }
  const MicroBatches micro_batches(inputs, options.micro_batch_size, options.weighting, options.short_last);
  std::vector<Part> parts;
  for (std::int64_t i = 0; i < micro_batches.count(); ++i) {
    parts.push_back(micro_batches.part(i));
  }
  return parts;
}

/// The device that all of `tensors` share, if they do.
inline std::optional<c10::Device> common_device(const std::vector<at::Tensor>& tensors) {
  const c10::Device device = tensors.front().device();
  const bool same =
      std::all_of(tensors.begin(), tensors.end(), [&](const at::Tensor& tensor) { return tensor.device() == device; });
  return same ? std::optional(device) : std::nullopt;
}

/// Throws BatchError for a tensor, OptionError for a generator, on another device than the model.
inline void check_devices(const MiniBatch& batch, const RegularizerOptions& options,
                          const std::vector<at::Tensor>& parameters) {
  const auto device = common_device(parameters);
  if (!device.has_value()) {
    return;  // A model spread over devices knows where its inputs go.
  }
  batch.for_each_tensor([&](const at::Tensor& tensor, const std::string& path) {
    if (tensor.defined() && tensor.device() != *device) {
      throw BatchError(
          text({path, " is on ", tensor.device(), ", the model on ", *device, "; move it with .to(", *device, ")"}));
    }
  });
  if (options.generator.has_value() && options.generator->device().type() != device->type()) {
    throw OptionError(text({"generator is on ", options.generator->device(), ", the model on ", *device,
                            "; make the generator on the model's device"}));
  }
}

/// Throws ModelError for a parameter that cannot be trained, or a `.grad` that cannot be added to.
inline void check_parameters(const Parameters& parameters) {
  for (std::size_t i = 0; i < parameters.tensors.size(); ++i) {
    const at::Tensor& parameter = parameters.tensors[i];
    if (!parameter.is_leaf()) {
      throw ModelError(text({"parameter ", parameters.names[i],
                             " is no leaf but computed from other tensors, so it would get no .grad; compute it "
                             "inside the model, and pass what it is computed from"}));
    }
    const char* const problem = problem_of_grad(parameter);
    if (problem != nullptr) {
      throw ModelError(text({".grad of parameter ", parameters.names[i], " is ", problem,
                             ", so nothing can be added to it; clear it with zero_grad(), or clone() it"}));
    }
  }
}

/// `gradient` with the strides of its parameter, as LibTorch's own accumulation promises; contiguous for a parameter
/// whose memory overlaps or has gaps.
inline at::Tensor laid_out_as(const at::Tensor& parameter, const at::Tensor& gradient) {
  if (!parameter.is_non_overlapping_and_dense()) {
    return gradient.to(parameter.scalar_type()).contiguous();
  }
  if (gradient.strides() == parameter.strides() && gradient.scalar_type() == parameter.scalar_type()) {
    return gradient;
  }
  return at::empty_strided(parameter.sizes(), parameter.strides(), parameter.options().requires_grad(false))
      .copy_(gradient);
}

/// What a step adds to the `.grad` fields of `parameters`, outside of any graph.
class GradUpdate {
 public:
  /// Allocates all that is needed.
  GradUpdate(const std::vector<at::Tensor>& parameters, const std::vector<at::Tensor>& sums) {
    const std::lock_guard lock(one_at_a_time());
    const at::NoGradGuard no_grad;
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      if (!sums[i].defined()) {
        continue;
      }
      if (parameters[i].grad().defined()) {
        into_.push_back(parameters[i].grad());
        from_.push_back(sums[i]);
      } else {
        without_.emplace_back(parameters[i], laid_out_as(parameters[i], sums[i]));
      }
    }
  }

  void write() {
    const std::lock_guard lock(one_at_a_time());
    const at::NoGradGuard no_grad;
    if (!into_.empty()) {
      at::_foreach_add_(into_, from_);
    }
    for (auto& [parameter, gradient] : without_) {  // last, since nothing throws any more
      if (parameter.grad().defined()) {             // by the other thread, meanwhile
        parameter.mutable_grad().add_(gradient);
      } else {
        parameter.mutable_grad() = std::move(gradient);
      }
    }
  }

 private:
  /// Two threads may step on one model, and plain accumulation is safe there.
  static std::mutex& one_at_a_time() {
    static std::mutex mutex;
    return mutex;
  }

  std::vector<at::Tensor> into_;
  std::vector<at::Tensor> from_;
  std::vector<std::pair<at::Tensor, at::Tensor>> without_;
};

/// The leaves of a loss's graph that require a gradient and would get none. Those that a pass makes for itself (a loss
/// that differentiates by its input) die with its graph; what somebody still holds then would have been trained.
class UntrainedLeaves {
 public:
  void note(const MiniBatch& batch, const Evaluation& evaluation, const Parameters& parameters) {
    std::unordered_set<const c10::TensorImpl*> known;
    const auto add = [&](const at::Tensor& tensor) { known.insert(tensor.unsafeGetTensorImpl()); };
    std::for_each(parameters.tensors.begin(), parameters.tensors.end(), add);
    std::for_each(evaluation.inputs.begin(), evaluation.inputs.end(), add);
    for (const at::Tensor& leaf : leaves_of(evaluation.loss)) {
      if (!known.contains(leaf.unsafeGetTensorImpl())) {
        found_.emplace_back(leaf.getIntrusivePtr());
      }
    }
    if (!found_.empty()) {
      batch.for_each_tensor([&](const at::Tensor& tensor, const std::string& /*path*/) {
        std::erase_if(found_,
                      [&](const auto& leaf) { return leaf._unsafe_get_target() == tensor.unsafeGetTensorImpl(); });
      });
    }
  }

  /// To be called when the graph is gone, or differentiated. Throws ModelError.
  void require_none() {
    for (const auto& weak : std::exchange(found_, {})) {
      const auto leaf = weak.lock();
      if (!leaf.defined()) {
        continue;
      }
      const at::Tensor tensor(leaf);
      const std::size_t ours = 2 + (torch::autograd::impl::try_get_grad_accumulator(tensor).get() != nullptr ? 1 : 0);
      if (tensor.use_count() > ours) {
        throw ModelError(
            text({"the loss is a function of a tensor of shape ", tensor.sizes(),
                  " that requires a gradient and is no parameter of the model (a parameter of the loss, an encoder in "
                  "front of the model, another network, a module that was not registered), so it would get no .grad; "
                  "pass it in the option also_train (to Penalised among the parameters), make one model of several "
                  "with modules(), detach() what comes from it, or set .other_leaves = OtherLeaves::ignored where that "
                  "is what you want"}));
      }
    }
  }

 private:
  std::vector<c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>> found_;
};

/// strength(step) of every penalty, times the common factor.
inline std::vector<double> strengths_at(const MiniBatch& batch, const RegularizerOptions& options, std::int64_t step) {
  const double common = options.strength.at(step);
  std::vector<double> result;
  for (std::size_t i = 0; i < batch.terms(); ++i) {
    result.push_back(common * batch.term(i).strength.at(step));
  }
  return result;
}

/// One step, from its checks to its report.
class Step {
 public:
  /// Throws before anything is changed, but for what Ranks::enter makes equal.
  Step(MiniBatch& batch, const RegularizerOptions& options, std::int64_t step, Ranks& ranks,
       bool without_penalties = false)
      : batch_(batch),
        options_(options),
        step_(step),
        ranks_(ranks),
        strengths_(strengths_at(batch, options, step)),
        parameters_(trainable(all_parameters(batch, options), options.select)),
        parts_(batch.parts()),
        active_(parameters_, options.estimator.differences() != nullptr),
        buffers_(batch.buffers()),
        snapshot_(checked_snapshot()),
        sums_{std::vector<at::Tensor>(parameters_.tensors.size()),
              std::vector<at::Tensor>(options.gradient_ratio ? parameters_.tensors.size() : 0)} {
    if (without_penalties) {
      strengths_.assign(strengths_.size(), 0.0);
    }
  }

  /// What `steps()` returns. If it throws, buffers and generators are put back, and parameters that the model writes
  /// to.
  template <class Steps>
  Report guarded(const Steps& steps) {
    SnapshotMemory* const memory = batch_.memory();
    draws_.emplace(memory == nullptr || memory->draws, snapshot_.generators());
    try {
      const GuardedGradients guard(parameters_.tensors, parameters_.names);
      Report report = steps();
      remember_written();
      if (memory != nullptr) {
        memory->draws = snapshot_.generators().moved();
      }
      return report;
    } catch (const SparseGradient& error) {
      snapshot_.restore_after_error(draws_->alone());
      rethrow_named(error);
    } catch (...) {
      snapshot_.restore_after_error(draws_->alone());
      throw;
    }
  }

  /// Undoes what the steps did.
  void restore() const { snapshot_.restore(draws_->alone()); }

  [[nodiscard]] const Parameters& parameters() const noexcept { return parameters_; }
  [[nodiscard]] const Snapshot& snapshot() const noexcept { return snapshot_; }
  [[nodiscard]] const std::vector<Part>& parts() const noexcept { return parts_; }
  [[nodiscard]] std::int64_t count() const noexcept { return ranks_.micro_batches(); }
  [[nodiscard]] const std::vector<at::Tensor>& buffers() const noexcept { return buffers_; }
  [[nodiscard]] const std::vector<double>& strengths() const noexcept { return strengths_; }

  /// Calls `estimate(part, weights, keep, go_on)` for every micro-batch, adds up what it returns and collects the
  /// report. `estimate` shows its first evaluation to `keep`, and calls `go_on` with it and the probes when model, loss
  /// and penalties have been called; that it need not call. It returns squared norms where weights.penalty is not 0.
  template <class Estimate>
  Report run(const Choice& choice, const Estimate& estimate) {
    const at::AutoGradMode enable_grad(true);
    const std::int64_t workers = possible_workers();
    if (workers > 0) {
      std::vector<at::Tensor> state;
      for (NamedParameter& each : all_parameters(batch_, options_)) {
        state.push_back(std::move(each.tensor));
      }
      side_by_side_.emplace(batch_, parameters_, std::move(state));
    }
    in_turns(workers, static_cast<std::int64_t>(parts_.size()),
             [&](std::int64_t i, Turns& turns) { estimate_part(i, turns, choice, estimate); });
    weigh_by_counts();
    return report(choice);
  }

  /// What the sums of this rank are to be multiplied by before they are added up with those of others, if by anything.
  [[nodiscard]] double own_scale() const {
    return counts_.empty() || ranks_.alone() ? 1 : std::max(counts_.front(), 1.0);
  }
  /// What the sums are to be multiplied by in the end. Throws ModelError where the counts of all losses are 0.
  [[nodiscard]] double scale(bool counted) const {
    if (!counted) {
      return 1;
    }
    if (!(ranks_.counts() > 0)) {
      throw ModelError("the counts of the losses of all micro-batches are 0; skip such mini-batches");
    }
    return (ranks_.alone() ? std::max(counts_.front(), 1.0) : 1.0) / ranks_.counts();
  }

  /// What the passes of this rank came to, for the others.
  [[nodiscard]] Ranks::Outcome outcome(std::vector<std::vector<at::Tensor>*> sums) const {
    Ranks::Outcome result;
    result.sums = std::move(sums);
    if (!counts_.empty()) {
      result.counts = std::accumulate(counts_.begin(), counts_.end(), 0.0);
    }
    result.uncounted = counts_.empty() && !parts_.empty();
    if (!ranks_.alone()) {
      for (const at::Tensor& buffer : buffers_) {
        const SavedTensor* const saved = snapshot_.find(buffer);
        result.moved.push_back(saved != nullptr && saved->differs());
      }
      for (std::size_t i = 0; i < parameters_.tensors.size() && !result.sums.empty(); ++i) {
        const SavedTensor* const saved = snapshot_.find(parameters_.tensors[i]);
        if (saved != nullptr && saved->changed()) {
          throw ModelError(text({"the forward pass writes to parameter ", parameters_.names[i],
                                 " (an Embedding's max_norm), which each of several ranks does for its own samples "
                                 "alone; do it between the steps, on all ranks"}));
        }
      }
    }
    return result;
  }

  /// The sums over micro-batches of the gradients, one a parameter: of the objective, and of the loss alone.
  struct Sums {
    std::vector<at::Tensor> objective;
    std::vector<at::Tensor> loss;
  };
  [[nodiscard]] Sums& sums() noexcept { return sums_; }

  /// Rethrows the error that is being handled, with the name of the parameter.
  [[noreturn]] void rethrow_named(const SparseGradient& error) const {
    for (std::size_t i = 0; i < parameters_.tensors.size(); ++i) {
      if (parameters_.tensors[i].is_same(error.parameter())) {
        throw ModelError(text({"parameter ", parameters_.names[i], ": ", error.what()}));
      }
    }
    throw;
  }

  /// What `work()` returns. Names the micro-batch for the errors of LibTorch that plain training does not meet.
  template <class Work>
  static auto explained(const Part& part, const Work& work) {
    try {
      return work();
    } catch (const std::exception& error) {
      if (part.size == 1 && part.count > 1 &&
          std::string_view(error.what()).find("Expected more than 1 value per channel") != std::string_view::npos) {
        throw BatchError(text({"micro-batch ", part.index, " of ", part.count,
                               " has one sample, over which batch normalisation has no variance in training mode; set "
                               ".short_last = ShortLast::merged or ShortLast::dropped, or choose another "
                               "micro_batch_size"}));
      }
      throw;
    }
  }

  /// Those of model and loss, and the options' own; frozen and repeated ones too.
  static std::vector<NamedParameter> all_parameters(const MiniBatch& batch, const RegularizerOptions& options) {
    std::vector<NamedParameter> result = batch.parameters();
    for (std::size_t i = 0; i < options.also_train.size(); ++i) {
      result.push_back({text({"also_train[", i, "]"}), options.also_train[i]});
    }
    return result;
  }

 private:
  template <class Estimate>
  void estimate_part(std::int64_t i, Turns& turns, const Choice& choice, const Estimate& estimate) {
    const Part& part = parts_[static_cast<std::size_t>(i)];
    const bool penalised = choice.chosen[static_cast<std::size_t>(part.index)];
    Weights weights{part.weight * total_scale(), penalised ? part.weight * choice.factor : 0.0, strengths_};
    UntrainedLeaves untrained;
    turns.await(Turns::Stage::forward, i);
    const OwnDraws::Here draws(*draws_);
    const RecurrentCalls recurrent(parts_.size() > 1 && watches_recurrent(part));
    const NormCalls norms(side_by_side_.has_value() && i == 0);
    if (side_by_side_.has_value()) {
      side_by_side_->begin(i == 0);
    }
    const auto keep = [&](Evaluation& evaluation) {
      if (evaluation.count.has_value()) {
        if (options_.weighting == Weighting::reference) {
          throw OptionError(
              "weighting is Weighting::reference, which counts micro-batches alike, and the loss returns a "
              "CountedLoss, "
              "by whose counts they weigh; return the mean from the loss, or leave weighting at Weighting::samples");
        }
        counts_.push_back(*evaluation.count);
        // Relative to the first, and not 0, by which a difference would divide; all of them are scaled at the end.
        const double relative = std::max(*evaluation.count / std::max(counts_.front(), 1.0), 1e-30);
        weights.loss = relative;
        weights.penalty = penalised ? relative * choice.factor : 0.0;
      }
      if (batch_.memory() != nullptr && batch_.memory()->first) {
        snapshot_.forget_unchanged_parameters();
      }
      if (options_.other_leaves == OtherLeaves::refused) {
        untrained.note(batch_, evaluation, parameters_);
      }
      losses_.push_back(evaluation.loss.detach());
      loss_parts_.push_back(std::move(evaluation.loss_parts));
      if (options_.keep_outputs) {
        outputs_.push_back(std::move(evaluation.outputs));
      }
    };
    const auto go_on = [&](const Evaluation& evaluation, const std::vector<std::vector<at::Tensor>>& probes) {
      if (side_by_side_.has_value() && may_go_on(i, turns, norms, evaluation, probes)) {
        turns.pass(Turns::Stage::forward, i);
      }
    };
    Estimated estimated = explained(part, [&] { return estimate(part, weights, keep, go_on); });
    recurrent.require_samples_in_batch(part.size);
    untrained.require_none();
    turns.await(Turns::Stage::sum, i);
    add_scaled(sums_.objective, std::move(estimated.gradients));
    add_scaled(sums_.loss, std::move(estimated.loss_gradient));
    if (penalised) {
      chosen_.push_back(part);
      squared_norms_.push_back(std::move(estimated.squared_norms));
    }
  }

  /// Whether the next micro-batch may begin. If this one has written to what others were differentiating by, they may
  /// meanwhile have said so in LibTorch's words: then this error is the step's.
  bool may_go_on(std::int64_t i, Turns& turns, const NormCalls& norms, const Evaluation& evaluation,
                 const std::vector<std::vector<at::Tensor>>& probes) {
    try {
      return side_by_side_->may_go_on(i == 0, norms, evaluation, probes);
    } catch (const ModelError&) {
      turns.stop_all();
    }
  }

  /// How many of them: 0 where a difference displaces the parameters, which all micro-batches read, where a device has
  /// a parallelism of its own, and where somebody's scope on this thread wants to see all operations.
  [[nodiscard]] std::int64_t possible_workers() const {
    const auto device = common_device(parameters_.tensors);
    const bool possible = options_.workers > 0 && options_.estimator.differences() == nullptr && device.has_value() &&
                          device->is_cpu() && !gates_are_watched();
    return possible ? options_.workers : 0;
  }

  /// |B| where the loss keeps the scale of a sum, otherwise 1.
  [[nodiscard]] double total_scale() const {
    return options_.reduction == Reduction::total ? static_cast<double>(ranks_.samples()) : 1;
  }

  /// Whether recurrent networks are looked for in this micro-batch: always if a module is one, once if nobody knows.
  [[nodiscard]] bool watches_recurrent(const Part& part) const {
    return std::any_of(parameters_.names.begin(), parameters_.names.end(), [&](const std::string& name) {
      return name.find("weight_ih") != std::string::npos ||
             (part.index == parts_.front().index && name.starts_with("parameters["));
    });
  }

  /// Where the loss says what it is a mean over, the micro-batches have counted by that.
  void weigh_by_counts() {
    if (counts_.empty()) {
      return;
    }
    if (counts_.size() != parts_.size()) {
      throw ModelError("the loss returned a CountedLoss for some micro-batches and not for others");
    }
    const double total = std::accumulate(counts_.begin(), counts_.end(), 0.0);
    for (std::size_t i = 0; i < parts_.size(); ++i) {
      parts_[i].weight = total > 0 ? counts_[i] / total : 1.0 / static_cast<double>(parts_.size());
    }
    for (Part& part : chosen_) {
      part.weight = parts_[static_cast<std::size_t>(part.index - parts_.front().index)].weight;
    }
  }

  /// The checks that need the parameters, and then the snapshot: of buffers, and of parameters that the forward pass
  /// writes to (an Embedding's max_norm), which the first step finds out.
  Snapshot checked_snapshot() {
    check_devices(batch_, options_, parameters_.tensors);
    check_parameters(parameters_);
    SnapshotMemory* const memory = batch_.memory();
    ranks_.enter({options_, parameters_, buffers_, batch_, strengths_, memory}, parts_);
    std::vector<at::Tensor> tensors = buffers_;
    const std::vector<at::Tensor>& written =
        memory != nullptr && !memory->first ? memory->written : parameters_.tensors;
    tensors.insert(tensors.end(), written.begin(), written.end());
    return {tensors, devices_of(parameters_.tensors), options_.generator, memory};
  }

  void remember_written() const {
    SnapshotMemory* const memory = batch_.memory();
    if (memory == nullptr || parts_.empty() || !std::exchange(memory->first, false)) {
      return;
    }
    for (const at::Tensor& tensor : snapshot_.changed()) {
      if (tensor.requires_grad()) {
        memory->written.push_back(tensor);
      }
    }
  }

  Report report(const Choice& choice) {
    const at::NoGradGuard no_grad;
    Report result;
    result.step = step_;
    result.all_micro_batches = count();
    if (parts_.empty()) {
      return report_of_none(result);
    }
    result.first_micro_batch = parts_.front().index;
    double share = 0;
    for (const Part& part : parts_) {
      result.samples += part.size;
      share += part.weight;
    }
    result.share = static_cast<std::int64_t>(parts_.size()) == count() ? 1 : share;
    for (const Part& part : chosen_) {
      result.penalised.push_back(part.index - parts_.front().index);
    }
    result.micro_batch_losses = at::stack(losses_);
    result.loss = weighted_sum(losses_, parts_);
    if (const double scale = counts_.empty() ? total_scale() : 1; scale != 1) {
      result.loss = result.loss * scale;
    }
    require_equal_parts();
    for (std::size_t i = 0; i < loss_parts_.front().size(); ++i) {
      std::vector<at::Tensor> values;
      for (const std::vector<at::Tensor>& parts : loss_parts_) {
        values.push_back(parts.at(i).is_floating_point() ? parts.at(i) : parts.at(i).to(result.loss.scalar_type()));
        if (options_.reduction != Reduction::mean && counts_.empty()) {
          values.back() = values.back() / parts_[values.size() - 1].size;
        }
      }
      result.loss_parts.push_back(weighted_sum(values, parts_));
    }
    result.micro_batch_outputs = std::move(outputs_);
    for (std::size_t p = 0; p < batch_.terms(); ++p) {
      const TermInfo& term = batch_.term(p);
      std::vector<at::Tensor> values;
      for (const std::vector<at::Tensor>& squared : squared_norms_) {
        values.push_back(squared[p]);
      }
      const at::Tensor norms = values.empty()
                                   ? at::zeros({static_cast<std::int64_t>(parts_.size())}, result.loss.options())
                                   : at::stack(values).sqrt();
      if (!term.squared) {
        values = values.empty() ? values : norms.unbind();
      }
      at::Tensor value = values.empty() ? at::zeros({}, result.loss.options()) : weighted_sum(values, chosen_);
      result.penalties.push_back({name_of(result.penalties, term.name), strengths_[p],
                                  choice.factor == 1 ? value : value * choice.factor, norms});
    }
    return result;
  }

  /// Of a rank without a sample.
  Report report_of_none(Report result) const {
    const at::TensorOptions scalar = parameters_.tensors.front().options().requires_grad(false);
    result.share = 0;
    result.loss = at::zeros({}, scalar);
    result.micro_batch_losses = at::zeros({0}, scalar);
    for (std::size_t p = 0; p < batch_.terms(); ++p) {
      result.penalties.push_back({name_of(result.penalties, batch_.term(p).name), strengths_[p], at::zeros({}, scalar),
                                  at::zeros({0}, scalar)});
    }
    return result;
  }

  /// `name`, or what a second one of that name is called.
  static std::string name_of(const std::vector<PenaltyReport>& before, const std::string& name) {
    const auto alike = std::count_if(before.begin(), before.end(), [&](const PenaltyReport& penalty) {
      return penalty.name == name || penalty.name.starts_with(name + "#");
    });
    return alike == 0 ? name : text({name, "#", alike + 1});
  }

  void require_equal_parts() const {
    const auto same_sizes = [](const at::Tensor& a, const at::Tensor& b) { return a.sizes() == b.sizes(); };
    for (const std::vector<at::Tensor>& parts : loss_parts_) {
      if (!std::equal(parts.begin(), parts.end(), loss_parts_.front().begin(), loss_parts_.front().end(), same_sizes)) {
        throw ModelError(
            "the loss returned parts of another number or shape than for the first micro-batch; return the same "
            "scalars each time");
      }
    }
  }

  /// The sum of weight(M) * values[M] over micro-batches, where the weights of all of the step count as 1 together. All
  /// weights but the last one's are equal, so no host tensor is made.
  at::Tensor weighted_sum(const std::vector<at::Tensor>& values, const std::vector<Part>& parts) const {
    double total = 0;
    for (const Part& part : parts_) {
      total += part.weight;
    }
    if (!counts_.empty()) {
      at::Tensor sum = values.front() * (parts.front().weight / total);
      for (std::size_t i = 1; i < values.size(); ++i) {
        sum = sum + values[i] * (parts[i].weight / total);
      }
      return sum;
    }
    const double all = parts_.size() == static_cast<std::size_t>(count()) ? 1 : total;
    const at::Tensor tail = values.back() * (parts.back().weight / all);
    if (values.size() == 1) {
      return tail;
    }
    const at::Tensor head = at::stack(std::vector<at::Tensor>(values.begin(), values.end() - 1));
    return head.sum(0) * (parts.front().weight / all) + tail;
  }

  MiniBatch& batch_;
  const RegularizerOptions& options_;
  std::int64_t step_;
  Ranks& ranks_;
  std::vector<double> strengths_;
  Parameters parameters_;
  std::vector<Part> parts_;
  ActiveStep active_;  // before anything is copied that another thread may be moving
  std::vector<at::Tensor> buffers_;
  Snapshot snapshot_;
  Sums sums_;

  std::optional<OwnDraws> draws_;
  std::optional<SideBySide> side_by_side_;  // where there are workers
  std::vector<double> counts_;              // where the loss gives them
  std::vector<Part> chosen_;
  std::vector<std::vector<at::Tensor>> squared_norms_;  // of the chosen ones
  std::vector<at::Tensor> losses_;
  std::vector<std::vector<at::Tensor>> loss_parts_;
  std::vector<std::vector<at::Tensor>> outputs_;
};

/// Throws where the input was computed with a graph, which the further passes of a difference would not repeat.
inline void require_plain_input(const MiniBatch& batch) {
  batch.for_each_tensor([](const at::Tensor& tensor, const std::string& path) {
    if (tensor.defined() && tensor.grad_fn() != nullptr) {
      throw ModelError(text({path,
                             " carries a graph, which the further passes of a difference do not repeat; detach() it, "
                             "compute it inside the model, or use Exact"}));
    }
  });
}

/// The gradient of weight * loss.
inline WeightedGradients loss_gradient(const at::Tensor& loss, double weight, const Scale& scale,
                                       const Parameters& parameters, bool retain_graph) {
  return {gradients({loss}, parameters.tensors, scale.seeds(loss), retain_graph, /*create_graph=*/false, "the loss"),
          scale.over(weight)};
}

/// Throws NonFiniteError, which names a cause that plain training does not meet: all labels of a micro-batch ignored.
inline void require_finite(const Report& report, const MiniBatch& batch, const std::vector<Part>& parts) {
  try {
    report.throw_if_not_finite();
  } catch (const NonFiniteError& error) {
    if (parts.empty()) {
      throw;
    }
    const Part& part = parts[static_cast<std::size_t>(error.micro_batch() - parts.front().index)];
    std::string cause;
    batch.for_each_tensor([&](const at::Tensor& tensor, const std::string& path) {
      if (path.starts_with("target") && tensor.defined() && tensor.layout() == at::kStrided && tensor.dim() > 0 &&
          at::isIntegralType(tensor.scalar_type(), /*includeBool=*/false) && part.begin + part.size <= tensor.size(0)) {
        const at::Tensor labels = tensor.narrow(0, part.begin, part.size);
        if (labels.numel() > 0 && (labels == labels.flatten()[0]).all().item<bool>()) {
          cause = text({"; all labels of the micro-batch in ", path, " are ", labels.flatten()[0].item<std::int64_t>(),
                        ": if that is the ignore_index, the mean is over none, so shuffle, choose a larger "
                        "micro_batch_size, or return (loss_sum / count.clamp_min(1)) from the loss"});
        }
      }
    });
    throw NonFiniteError(error.what() + cause, error.micro_batch());
  }
}

/// Whether the options ask to look for NaN and infinity in a step of this report.
inline bool looks_for_non_finite(const Report& report, const RegularizerOptions& options) {
  return options.check_finite == CheckFinite::always || options.non_finite != NonFinite::error ||
         (options.check_finite == CheckFinite::on_cpu && report.loss.is_cpu());
}

/// Looks for NaN and infinity in the report as the options ask. Whether the step is to be skipped; throws
/// NonFiniteError otherwise.
inline Fared check_finite(const Report& report, const MiniBatch& batch, const RegularizerOptions& options,
                          const std::vector<Part>& parts) {
  if (options.non_finite == NonFinite::skip_step) {
    try {
      report.throw_if_not_finite();
    } catch (const NonFiniteError&) {
      return Fared::to_be_skipped;
    }
  } else if (looks_for_non_finite(report, options)) {
    require_finite(report, batch, parts);
  }
  return Fared::well;
}

/// The same on one of several ranks, before its sums meet the others'. Under a loss scale that follows the gradients an
/// infinite penalty is no error, but `overflowed`.
inline Fared check_own(const Report& report, const MiniBatch& batch, const RegularizerOptions& options,
                       const std::vector<Part>& parts, bool& overflowed) {
  if (!options.loss_scale.dynamic.has_value()) {
    return check_finite(report, batch, options, parts);
  }
  overflowed = !std::all_of(report.penalties.begin(), report.penalties.end(),
                            [](const PenaltyReport& penalty) { return penalty.value.isfinite().item<bool>(); });
  return report.loss.isfinite().item<bool>() ? Fared::well : check_finite(report, batch, options, parts);
}

inline Report step_once(MiniBatch& batch, const RegularizerOptions& options, Progress& progress, Ranks& ranks,
                        bool without_penalties) {
  ranks.expect_lists(options.gradient_ratio ? 2 : 1);
  Step loop(batch, options, progress.step, ranks, without_penalties);
  Progress next = progress;
  return loop.guarded([&] {
    const Parameters& parameters = loop.parameters();
    const Scale scale = scale_of(options.loss_scale, next.scale, parameters.tensors.front().device());
    std::vector<at::Tensor>& sums = loop.sums().objective;
    std::vector<at::Tensor>& loss_sums = loop.sums().loss;
    std::unique_ptr<Differences> difference;
    if (options.estimator.differences() != nullptr) {
      require_plain_input(batch);
      difference = options.estimator.differences()(
          {options.estimator, parameters, next.proof, options.fused, options.check_finite});
    }
    const FusedScope fused(options.fused && difference == nullptr);
    const HalfRange range(scale, options.autocast, parameters);
    Report report = loop.run(
        choose_penalised(options.sampling, progress.step, loop.count()),
        [&](const Part& part, const Weights& weights, const auto& keep, const auto& go_on) -> Estimated {
          const auto of_loss = [&](const Evaluation& evaluation, bool retain_graph) {
            return loss_gradient(evaluation.loss, weights.loss, scale, parameters, retain_graph);
          };
          const auto ratio = [&](const Evaluation& evaluation) {
            return options.gradient_ratio ? std::vector{of_loss(evaluation, /*retain_graph=*/true)}
                                          : std::vector<WeightedGradients>();
          };
          if (difference != nullptr && weights.penalty != 0) {
            Estimated result;
            result.squared_norms =
                (*difference)(batch, part, weights, loop.snapshot(), sums, [&](Evaluation& evaluation) {
                  keep(evaluation);
                  result.loss_gradient = ratio(evaluation);
                });
            return result;
          }
          const auto evaluation = batch.evaluate(part, {});
          keep(*evaluation);
          auto probes = weights.penalty != 0 ? all_probes(batch, *evaluation) : std::vector<std::vector<at::Tensor>>();
          go_on(*evaluation, probes);
          auto of_ratio = ratio(*evaluation);
          Estimated result = weights.penalty != 0
                                 ? double_backward(batch, *evaluation, std::move(probes), weights, parameters, range)
                                 : Estimated{{}, {of_loss(*evaluation, evaluation->shares_graph)}};
          result.loss_gradient = std::move(of_ratio);
          return result;
        });
    report.penalty_skipped = without_penalties;
    if (without_penalties) {
      report.penalised.clear();  // measured, maybe as infinite, and of no effect
      for (PenaltyReport& penalty : report.penalties) {
        penalty.value = at::zeros_like(penalty.value);
        penalty.micro_batch_norms = at::zeros_like(penalty.micro_batch_norms);
      }
    }
    std::vector<std::vector<at::Tensor>*> lists{&sums};
    if (options.gradient_ratio) {
      lists.push_back(&loss_sums);
    }
    const auto scale_sums = [&](double factor) {
      const at::NoGradGuard no_grad;
      for (auto* list : lists) {
        if (const auto there = defined(*list); factor != 1 && !there.empty()) {
          at::_foreach_mul_(there, factor);
        }
      }
    };
    const auto skipped = [&] {
      loop.restore();
      report.skipped = true;
      ++progress.skipped;
      return report;
    };
    const auto finish = [&] {
      if (difference != nullptr) {
        difference->finish();
      }
    };

    Ranks::Outcome outcome = loop.outcome(lists);
    const bool counted = outcome.counts.has_value();
    if (!ranks.alone()) {  // what is wrong on this rank is said before anything is added up
      outcome.fared = check_own(report, batch, options, loop.parts(), outcome.overflowed);
      outcome.factor = next.proof.factor;
      finish();
      scale_sums(loop.own_scale());
    }
    if (ranks.agree(outcome)) {
      return skipped();
    }
    next.proof.factor = ranks.alone() ? next.proof.factor : outcome.factor;
    ranks.add_up(lists, parameters.tensors);
    const std::vector<at::Tensor> merged =
        ranks.merged(loop.buffers(), loop.snapshot(), outcome.moved, options.rank_buffers);
    ranks.check();
    scale_sums(loop.scale(counted || ranks.counts() > 0));
    if (counted) {
      report.share = ranks.alone() ? 1 : *outcome.counts / ranks.counts();
    }
    const at::TensorOptions scalar = report.loss.options();
    report.gradient_norm = squared_norm(sums, scalar).sqrt();
    if (outcome.overflowed) {
      report.gradient_norm = at::full_like(report.gradient_norm, std::numeric_limits<double>::infinity());
    }
    if (options.gradient_ratio) {
      report.gradient_ratio =
          squared_norm(differences(sums, loss_sums), scalar).sqrt() * over_norm(squared_norm(loss_sums, scalar), 1.0);
    }
    if (options.loss_scale.dynamic.has_value()) {
      follow(*options.loss_scale.dynamic, next.scale, sums, report);
      // Where the loss itself is infinite, no scale helps.
      if (looks_for_non_finite(report, options) && report.loss.isfinite().item<bool>() &&
          report.overflow.item<bool>()) {
        ranks.commit(Fared::well);
        report.skipped = true;
        progress.scale = next.scale;
        return report;
      }
    }
    const Fared fared = check_finite(report, batch, options, loop.parts());
    if (ranks.alone() && fared == Fared::well) {
      finish();
    }
    GradUpdate update(parameters.tensors, sums);
    if (ranks.commit(fared)) {
      return skipped();
    }
    for (std::size_t i = 0; i < merged.size(); ++i) {
      if (merged[i].defined()) {
        const at::NoGradGuard no_grad;
        without_repetitions(loop.buffers()[i].detach()).copy_(merged[i]);
      }
    }
    update.write();
    progress.proof = next.proof;  // and no more: a callable may have set or replaced the rest
    progress.scale = next.scale;
    return report;
  });
}

/// What `work()` returns; the other ranks hear of what it throws.
template <class Work>
Report on_all_ranks(Ranks& ranks, const Work& work) {
  try {
    return work();
  } catch (const NonFiniteError& error) {
    ranks.leave(error, true);
    throw;
  } catch (const std::exception& error) {
    ranks.leave(error, false);
    throw;
  } catch (...) {
    ranks.leave(std::runtime_error("something was thrown that is no std::exception"), false);
    throw;
  }
}

MICROREG_INLINE Report take_step(MiniBatch& batch, const RegularizerOptions& options, Progress& progress) {
  Ranks ranks(options.communicator.get(), progress.step);
  return on_all_ranks(ranks, [&] {
    if (options.non_finite == NonFinite::skip_penalty) {
      try {
        return step_once(batch, options, progress, ranks, /*without_penalties=*/false);
      } catch (const NonFiniteError& error) {
        if (!ranks.leave(error, true)) {
          throw;
        }
        ranks.begin_again();
      }
      return step_once(batch, options, progress, ranks, /*without_penalties=*/true);
    }
    return step_once(batch, options, progress, ranks, /*without_penalties=*/false);
  });
}

MICROREG_INLINE std::int64_t Progress::all_skipped() const {
  return skipped + (scale.skipped.defined() ? scale.skipped.item<std::int64_t>() : 0);
}

MICROREG_INLINE void Progress::set_scale(double number) {
  scale.scale = at::full({}, number, at::kFloat);
  scale.good_steps.reset();
}

MICROREG_INLINE Report measure_step(MiniBatch& batch, const RegularizerOptions& options) {
  Ranks ranks(options.communicator.get(), 0);
  ranks.expect_lists(0);
  return on_all_ranks(ranks, [&] {
    Step loop(batch, options, 0, ranks);
    return loop.guarded([&] {
      Report report =
          loop.run(all_penalised(loop.count()),
                   [&](const Part& part, const Weights& /*weights*/, const auto& keep, const auto& go_on) -> Estimated {
                     const auto evaluation = batch.evaluate(part, {});
                     keep(*evaluation);
                     const auto probes = all_probes(batch, *evaluation);
                     go_on(*evaluation, probes);
                     return {squared_norms(batch, *evaluation, probes, loop.parameters(), options.loss_scale.number)};
                   });
      Ranks::Outcome outcome = loop.outcome({});
      ranks.agree(outcome);
      loop.restore();
      ranks.check();
      if (outcome.counts.has_value()) {
        static_cast<void>(loop.scale(true));  // throws where there is none
        report.share = *outcome.counts / ranks.counts();
      }
      ranks.commit(Fared::well);
      return report;
    });
  });
}

}  // namespace microreg::inline MICROREG_ABI::detail
