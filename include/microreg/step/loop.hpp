/// @file
/// The loop over the micro-batches of a step, and the promise that nothing is left behind by a failed one.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <microreg/detail/text.hpp>
#include <microreg/detail/version_of.hpp>
#include <microreg/error.hpp>
#include <microreg/gates/watched.hpp>
#include <microreg/options.hpp>
#include <microreg/parameters.hpp>
#include <microreg/report.hpp>
#include <microreg/step/active_steps.hpp>
#include <microreg/step/collected.hpp>
#include <microreg/step/gradients.hpp>
#include <microreg/step/guarded_gradients.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/own_draws.hpp>
#include <microreg/step/probes.hpp>
#include <microreg/step/ranks.hpp>
#include <microreg/step/recurrent.hpp>
#include <microreg/step/requirements.hpp>
#include <microreg/step/sampling.hpp>
#include <microreg/step/side_by_side.hpp>
#include <microreg/step/snapshot.hpp>
#include <microreg/step/tensor_lists.hpp>
#include <microreg/step/turns.hpp>
#include <microreg/step/untrained_leaves.hpp>
#include <microreg/step/visitor.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

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
        all_parameters_(all_parameters(batch, options)),
        parameters_(trainable(all_parameters_, options.select)),
        parts_(batch.parts()),
        active_(parameters_, moves(), std::min(workers(), static_cast<std::int64_t>(parts_.size())) > 1),
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
    draws_.emplace(batch_.memory() == nullptr || batch_.memory()->draws, snapshot_.generators());
    try {
      const GuardedGradients guard(parameters_.tensors, parameters_.names);
      Report report = steps();
      remember_draws(/*done=*/true);
      remember_written();
      return report;
    } catch (const SparseGradient& error) {
      restore_after_error();
      rethrow_named(error);
    } catch (...) {
      restore_after_error();
      throw;
    }
  }

  /// Undoes what the steps did.
  void restore() {
    snapshot_.restore(draws_->alone());
    say_what_stays();
  }

  [[nodiscard]] const Parameters& parameters() const noexcept { return parameters_; }
  [[nodiscard]] const Snapshot& snapshot() const noexcept { return snapshot_; }
  [[nodiscard]] const std::vector<Part>& parts() const noexcept { return parts_; }
  [[nodiscard]] std::int64_t count() const noexcept { return ranks_.micro_batches(); }
  [[nodiscard]] const std::vector<at::Tensor>& buffers() const noexcept { return buffers_; }
  [[nodiscard]] const std::vector<double>& strengths() const noexcept { return strengths_; }

  /// How many micro-batches at a time, or 0: where parameters are displaced, which all of them read, where a device has
  /// a parallelism of its own, and where somebody's scope on this thread wants to see all operations.
  [[nodiscard]] std::int64_t workers() const {
    const auto device = common_device(parameters_.tensors);
    const bool possible = options_.workers > 0 && options_.cuda_graph == nullptr && !displaces() &&
                          device.has_value() && device->is_cpu() && !gates_are_watched();
    return possible ? options_.workers : 0;
  }

  /// Calls `estimate(part, weights, visitor)` for every micro-batch, adds up what it returns and collects the report.
  /// It returns squared norms where weights.penalty is not 0.
  template <class Estimate>
  Report run(const Choice& choice, const Estimate& estimate) {
    const at::AutoGradMode enable_grad(true);
    const std::int64_t side_by_side = workers();
    if (side_by_side > 0) {
      std::vector<at::Tensor> state;
      for (const NamedParameter& each : all_parameters_) {
        state.push_back(each.tensor);
      }
      side_by_side_.emplace(batch_, parameters_, std::move(state), options_.estimator.differences() != nullptr);
    }
    in_turns(side_by_side, static_cast<std::int64_t>(parts_.size()),
             [&](std::int64_t i, Turns& turns) { estimate_part(i, turns, choice, estimate); });
    collected_.weigh_by_counts();
    Report report = collected_.report(step_, count(), strengths_, choice.factor, total_scale(),
                                      parameters_.tensors.front().options().requires_grad(false));
    report.replayed = replayed_;
    return report;
  }

  /// What the sums of this rank are to be multiplied by before they are added up with those of others, if by anything.
  [[nodiscard]] double own_scale() const {
    return collected_.counted() && !ranks_.alone() ? collected_.first_count() : 1;
  }
  /// What the sums are to be multiplied by in the end. Throws ModelError where the counts of all losses are 0.
  [[nodiscard]] double scale(bool counted) const {
    if (!counted) {
      return 1;
    }
    if (!(ranks_.counts() > 0)) {
      throw ModelError("the counts of the losses of all micro-batches are 0; skip such mini-batches");
    }
    return (ranks_.alone() ? collected_.first_count() : 1) / ranks_.counts();
  }

  /// What the passes of this rank came to, for the others.
  [[nodiscard]] Ranks::Outcome outcome(std::vector<std::vector<at::Tensor>*> sums) const {
    Ranks::Outcome result;
    result.sums = std::move(sums);
    if (collected_.counted()) {
      result.counts = collected_.all_counts();
    }
    result.uncounted = !collected_.counted() && !parts_.empty();
    if (!ranks_.alone()) {
      for (const at::Tensor& buffer : buffers_) {
        const SavedTensor* const saved = snapshot_.find(buffer);
        result.moved.push_back(saved != nullptr && saved->differs());
      }
      for (std::size_t i = 0; i < all_parameters_.size() && !result.sums.empty(); ++i) {
        if (all_parameters_[i].tensor.requires_grad() && version_of(all_parameters_[i].tensor) != versions_[i]) {
          throw ModelError(text({"the forward pass writes to parameter ", all_parameters_[i].name,
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
    Calls calls(calling_);
    const OwnDraws::Here draws(*draws_);
    const RecurrentCalls recurrent(parts_.size() > 1 && watches_recurrent(part));
    std::optional<StateCalls> state;
    const auto begin = [&] {
      if (side_by_side_.has_value()) {
        side_by_side_->begin(state);
      }
    };
    const auto keep = [&](Evaluation& evaluation) {
      if (evaluation.count.has_value()) {
        const double relative = collected_.weight_by_count(*evaluation.count);
        weights.loss = relative;
        weights.penalty = penalised ? relative * choice.factor : 0.0;
      }
      if (batch_.memory() != nullptr && batch_.memory()->first) {
        snapshot_.forget_unchanged_parameters();
      }
      if (options_.other_leaves == OtherLeaves::refused) {
        untrained.note(batch_, evaluation, parameters_);
      }
      collected_.add(evaluation);
    };
    const auto go_on = [&](const Evaluation& evaluation, const std::vector<std::vector<at::Tensor>>& probes,
                           bool through_first) {
      if (!side_by_side_.has_value()) {
        return;
      }
      const bool apart = may_go_on(turns, *state, evaluation, probes, through_first);
      state.reset();
      if (apart) {
        turns.pass(Turns::Stage::forward, i);
        calls.leave();
      }
    };
    Estimated estimated = explained(part, [&] { return estimate(part, weights, Visitor{calls, begin, keep, go_on}); });
    calls.leave();
    recurrent.require_samples_in_batch(part.size);
    untrained.require_none();
    turns.await(Turns::Stage::sum, i);
    add_scaled(sums_.objective, std::move(estimated.gradients));
    add_scaled(sums_.loss, std::move(estimated.loss_gradient));
    replayed_ += estimated.replayed ? 1 : 0;
    if (penalised) {
      collected_.add_penalised(part, std::move(estimated.squared_norms));
    }
  }

  /// Whether the next micro-batch may begin. If this one has written to what others were differentiating by, they may
  /// meanwhile have said so in LibTorch's words: then this error is the step's.
  bool may_go_on(Turns& turns, const StateCalls& state, const Evaluation& evaluation,
                 const std::vector<std::vector<at::Tensor>>& probes, bool through_first) {
    try {
      return side_by_side_->may_go_on(state, evaluation, probes, through_first);
    } catch (const ModelError&) {
      turns.stop_all();
    }
  }

  [[nodiscard]] bool displaces() const {
    bool any = false;
    for (std::size_t i = 0; i < batch_.terms(); ++i) {
      any = any || !batch_.term(i).by_input;
    }
    return any && options_.estimator.displaces_parameters();
  }

  [[nodiscard]] ActiveStep::Moves moves() const {
    return displaces()                                   ? ActiveStep::Moves::parameters
           : options_.estimator.differences() != nullptr ? ActiveStep::Moves::buffers
                                                         : ActiveStep::Moves::nothing;
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

  /// The checks that need the parameters, and then the snapshot: of buffers, and of parameters that the forward pass
  /// writes to (an Embedding's max_norm), which the first step finds out, frozen ones too.
  Snapshot checked_snapshot() {
    check_devices(batch_, options_, parameters_.tensors);
    check_parameters(parameters_);
    SnapshotMemory* const memory = batch_.memory();
    ranks_.enter({options_, parameters_, all_parameters_, buffers_, batch_, strengths_, memory}, parts_);
    std::vector<at::Tensor> trained, frozen;
    std::size_t trained_bytes = 0, frozen_bytes = 0;
    for (const NamedParameter& each : all_parameters_) {
      versions_.push_back(version_of(each.tensor));
      const bool trains = each.tensor.requires_grad();
      (trains ? trained : frozen).push_back(each.tensor);
      (trains ? trained_bytes : frozen_bytes) += each.tensor.nbytes();
    }
    // A large network that is frozen around a small one that is trained is not held twice for this.
    if (constexpr std::size_t small = std::size_t{1} << 28; frozen_bytes <= std::max(trained_bytes, small)) {
      trained.insert(trained.end(), frozen.begin(), frozen.end());
    }
    return {buffers_, memory == nullptr || memory->first ? trained : memory->written, devices_of(parameters_.tensors),
            options_.generator, memory};
  }

  void remember_written() {
    if (SnapshotMemory* const memory = batch_.memory(); memory != nullptr && !parts_.empty()) {
      memory->first = false;
      for_each_newly_written([&](const NamedParameter& each) { memory->written.push_back(each.tensor); });
    }
  }

  /// Once a step has drawn, all are followed: not every one gets as far, or has a penalty that draws.
  void remember_draws(bool done) {
    if (SnapshotMemory* const memory = batch_.memory()) {
      memory->draws = draws_->drawn() || (memory->draws && !(memory->first && done));
    }
  }

  /// Calls `visit` for every parameter that was written to, and not in a step before.
  template <class Visit>
  void for_each_newly_written(const Visit& visit) {
    const SnapshotMemory* const memory = batch_.memory();
    for (std::size_t i = 0; i < all_parameters_.size(); ++i) {
      const at::Tensor& tensor = all_parameters_[i].tensor;
      const auto is_this = [&](const at::Tensor& other) { return other.is_same(tensor); };
      if (std::exchange(versions_[i], version_of(tensor)) != version_of(tensor) &&
          (memory == nullptr || std::none_of(memory->written.begin(), memory->written.end(), is_this))) {
        visit(all_parameters_[i]);
      }
    }
  }

  /// Parameters are copied once it is known that the model writes to them: where that is seen for the first time in the
  /// step that fails, it is said.
  void restore_after_error() {
    snapshot_.restore_after_error(is_alone());
    without_errors([&] {
      remember_draws(/*done=*/false);
      say_what_stays();
    });
  }

  void say_what_stays() {
    for_each_newly_written([&](const NamedParameter& each) {
      if (SnapshotMemory* const memory = batch_.memory()) {
        memory->written.push_back(each.tensor);
      }
      if (snapshot_.find(each.tensor) == nullptr) {
        TORCH_WARN("microreg could not put back parameter ", each.name,
                   ", to which the forward pass wrote for the first time in a step that was undone");
      }
    });
  }

  [[nodiscard]] bool is_alone() const noexcept {
    bool result = false;
    without_errors([&] { result = draws_->alone(); });
    return result;
  }

  MiniBatch& batch_;
  const RegularizerOptions& options_;
  std::int64_t step_;
  Ranks& ranks_;
  std::vector<double> strengths_;
  std::vector<NamedParameter> all_parameters_;
  Parameters parameters_;
  std::vector<Part> parts_;
  ActiveStep active_;  // before anything is copied that another thread may be moving
  std::vector<at::Tensor> buffers_;
  std::vector<std::uint64_t> versions_;  // of all parameters
  Snapshot snapshot_;
  Sums sums_;
  Collected collected_{batch_, options_, parts_};

  std::optional<OwnDraws> draws_;
  std::optional<SideBySide> side_by_side_;  // where there are workers
  std::int64_t replayed_ = 0;
  std::mutex calling_;
};

}  // namespace microreg::inline MICROREG_ABI::detail
