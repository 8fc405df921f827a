/// @file
/// Regularizer: the loop over micro-batches that fills `.grad` with the gradient of loss and penalties.
#pragma once

#include <microreg/error.hpp>
#include <microreg/model.hpp>
#include <microreg/options.hpp>
#include <microreg/penalty.hpp>
#include <microreg/report.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/objective.hpp>

#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

namespace microreg::inline MICROREG_ABI {

/// Adds explicit regularizers to a training loop. One call of backward() adds to `.grad` the gradient of
///
///     objective(w) = sum over M of weight(M) * [ L_M(w) + strength * R_M(w) ],
///
/// where the micro-batches M cut the mini-batch B, L_M is the mean loss of M, R_M the penalty, and weight(M) = |M|/|B|
/// (arXiv:2211.15853, equation 2; Weighting::reference for the authors' weights). It does forward, loss, penalty and
/// accumulation one micro-batch at a time, so the micro-batch sets the peak memory, not the batch.
///
/// - Model: see Model in model.hpp. A module passed by reference must outlive the Regularizer.
/// - Loss: any callable `loss(output, target)` that returns a scalar, the mean over samples (or the sum, with
///   `.reduction = Reduction::sum`). A loss whose mean does not count samples (class weights, ignore_index) is taken
///   as it is for each micro-batch, unless it returns a CountedLoss. A loss that is a module holder may have
///   parameters, which are trained too. Of a tuple, or a type with microreg_fields, the first tensor is the loss, and
///   the others come back in Report::loss_parts. A loss that takes the output alone goes with the target type NoTarget.
/// - Penalty: one penalty, a sum of penalties with strengths of their own, or an AnyPenalty.
/// - Estimator: Exact, or a difference of first derivatives, which is cheaper; `.sampling` makes any of them cheaper
///   still. See RegularizerOptions.
///
/// Its type depends on the batch alone, Input and Target, which are tensors by default. So it can be a member of a
/// class (`microreg::Regularizer<> regularizer_;`), be assigned, and stand in a container. Constructed with arguments
/// it reads the types off the signatures of forward() and the loss, where these are no templates. Copies share model,
/// loss and penalty, and count their steps alone.
///
/// Cost: 3.0 plain steps in exact arithmetic for one penalty. No synchronisation of a CUDA device, unless
/// `.check_finite = CheckFinite::always`. Strong guarantee: if anything throws, parameters, buffers, `.grad`, random
/// number generators and step() are what they were.
///
/// ```cpp
/// microreg::Regularizer regularizer(model, torch::nn::CrossEntropyLoss(), microreg::GradientNorm{},
///                                   {.strength = 0.01, .micro_batch_size = 128});
/// optimizer.zero_grad();
/// auto report = regularizer.backward(images, labels);
/// optimizer.step();
/// ```
template <class Input = at::Tensor, class Target = at::Tensor>
class Regularizer {
 public:
  /// None yet: to be assigned to. backward() throws OptionError.
  Regularizer() = default;

  /// Throws OptionError for an option out of range, ModelError for a module holder that is empty. The parameters are
  /// looked up in each step.
  template <class M, class Loss, class PenaltyOrSum>
  Regularizer(M&& model, Loss loss, PenaltyOrSum penalty, RegularizerOptions options = {})
      : objective_(detail::make_objective<Input, Target>(std::forward<M>(model), std::move(loss), std::move(penalty))),
        options_(std::move(options)) {
    detail::validate(options_);
  }

  /// Adds the gradient of the objective on this mini-batch to `.grad` and returns what it found.
  ///
  /// Throws BatchError (empty, first dimensions that differ, wrong device), ModelError (no parameter to train, a loss
  /// that is no scalar, an output or operation that cannot be differentiated), OptionError (a strength schedule's
  /// value), NonFiniteError (see CheckFinite), and whatever model and loss throw.
  template <class I, class T>
  Report backward(const I& input, const T& target) {
    detail::assert_batches<I, T>();
    static_assert(std::is_convertible_v<const I&, Input>,
                  "microreg: the model cannot be called with this input: the Regularizer was made for another type; "
                  "write Regularizer<Input, Target> with the types that backward() is to take");
    static_assert(!std::is_same_v<Target, NoTarget> || std::is_same_v<T, NoTarget>,
                  "microreg: the loss cannot be called as loss(output, target), since it takes the output alone: call "
                  "backward(input)");
    static_assert(std::is_convertible_v<const T&, Target> || std::is_same_v<Target, NoTarget>,
                  "microreg: the loss cannot be called as loss(output, target) with this target: the Regularizer was "
                  "made for another type; write Regularizer<Input, Target> with the types that backward() is to take");
    if constexpr (std::is_convertible_v<const I&, Input> && std::is_convertible_v<const T&, Target>) {
      static_assert(detail::keeps_cut<I, Input>() && detail::keeps_cut<T, Target>(),
                    "microreg: the batch says where its samples lie (Along, Whole, OnHost, PerSample) and the "
                    "Regularizer's type does not: write Regularizer<Input, Target> with the types of the batch");
      return step_on(input, target);
    }
  }

  /// The same with a loss that takes the output alone.
  Report backward(const Input& input)
    requires std::is_same_v<Target, NoTarget>
  {
    return step_on(input, NoTarget{});
  }

  /// How many steps were taken: what a strength schedule is asked with.
  [[nodiscard]] std::int64_t step() const noexcept { return progress_.step; }
  /// Sets the step, for a run that resumes.
  void set_step(std::int64_t step) noexcept { progress_.step = step; }
  /// How many steps NonFinite::skip_step or a DynamicLossScale left out so far. Waits for a CUDA device with the
  /// latter.
  [[nodiscard]] std::int64_t skipped() const { return progress_.all_skipped(); }
  /// Counts a step, where `.advance = false` keeps backward() from it.
  void advance() noexcept { ++progress_.step; }
  /// With a DynamicLossScale: S of the next step, a scalar on the device; undefined before the first.
  [[nodiscard]] const at::Tensor& loss_scale() const noexcept { return progress_.scale.scale; }
  /// Lets it go on from here, for a run that resumes. Throws OptionError for a scale that is not above 0, and without a
  /// DynamicLossScale.
  void set_loss_scale(double scale) { progress_.set_scale(scale, options_.loss_scale); }

  [[nodiscard]] const RegularizerOptions& options() const noexcept { return options_; }  ///< those it was made with

 private:
  Report step_on(const Input& input, const Target& target);

  std::shared_ptr<detail::Objective<Input, Target>> objective_;
  RegularizerOptions options_;
  detail::Progress progress_;
  detail::OwnMemory memory_;
};

template <class M, class Loss, class PenaltyOrSum>
Regularizer(M&&, Loss, PenaltyOrSum, RegularizerOptions = {})
    -> Regularizer<detail::InputOf<M>, detail::TargetOf<Loss>>;  ///< of the batch that forward() and the loss take

template <class Input, class Target>
Report Regularizer<Input, Target>::step_on(const Input& input, const Target& target) {
  if (objective_ == nullptr) {
    throw OptionError("this Regularizer is empty; assign one that is made of a model, a loss and a penalty");
  }
  // Held, in case a callable of the user's assigns to this Regularizer meanwhile.
  const auto objective = objective_;
  const RegularizerOptions options = options_;
  const auto memory = memory_.shared();
  detail::ObjectiveOnBatch<Input, Target> batch(*objective, options, input, target, memory.get());
  Report report = detail::take_step(batch, options, progress_);
  progress_.step += options.advance ? 1 : 0;
  return report;
}

#if defined(MICROREG_COMPILED)
extern template class Regularizer<at::Tensor, at::Tensor>;
#endif

}  // namespace microreg::inline MICROREG_ABI

#if !defined(MICROREG_COMPILED)
#include <microreg/definitions/regularizer.hpp>
#endif
