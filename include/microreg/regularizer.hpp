/// @file
/// Regularizer: the loop over micro-batches that fills `.grad` with the gradient of loss and penalties.
#pragma once

#include <microreg/detail/micro_batch_loop.hpp>
#include <microreg/estimators/double_backward.hpp>
#include <microreg/estimators/finite_difference.hpp>
#include <microreg/fused/scope.hpp>
#include <microreg/model.hpp>
#include <microreg/options.hpp>
#include <microreg/penalty.hpp>
#include <microreg/report.hpp>

#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

namespace microreg {

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
///   as it is for each micro-batch.
/// - Penalty: one penalty, or a sum of penalties with strengths of their own.
/// - Estimator: Exact, or a difference of first derivatives, which is cheaper; `.micro_batch_share` and `.every` make
///   any of them cheaper still. See RegularizerOptions.
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
template <class Handle, class Loss, class Terms>
class Regularizer {
 public:
  template <class M, class PenaltyOrSum>
  Regularizer(M&& model, Loss loss, PenaltyOrSum penalty, RegularizerOptions options = {})
      : handle_(detail::make_handle(std::forward<M>(model))),
        loss_(std::move(loss)),
        terms_(detail::as_terms(std::move(penalty))),
        options_(std::move(options)) {
    detail::validate(options_);
  }

  /// Adds the gradient of the objective on this mini-batch to `.grad` and returns what it found.
  ///
  /// Throws BatchError (empty, first dimensions that differ, wrong device), ModelError (no parameter to train, a loss
  /// that is no scalar, an output or operation that cannot be differentiated), OptionError (a strength schedule's
  /// value), NonFiniteError (see CheckFinite), and whatever model and loss throw.
  template <class Input, class Target>
  Report backward(const Input& input, const Target& target) {
    detail::assert_batches<Input, Target>();
    const std::vector<double> strengths = detail::strengths_at(terms_, options_.strength, step_);
    detail::MicroBatchLoop loop(handle_, options_, input, target);
    try {
      std::vector<at::Tensor> sums(loop.parameters().tensors.size());
      auto difference = detail::finite_difference(options_.estimator, terms_, strengths, loop.parameters());
      const FusedScope fused(options_.fused && !difference.has_value());
      Report report =
          loop.run(loss_, terms_, strengths, detail::choose_penalised(options_, step_, loop.count()),
                   [&](const auto& micro_batch, const auto& weights, std::vector<at::Tensor>& squared_norms) {
                     if (weights.penalty == 0) {
                       const auto evaluated = micro_batch();
                       detail::add_loss_gradient(evaluated.loss, weights.loss, loop.parameters(), sums);
                     } else if (difference.has_value()) {
                       (*difference)(micro_batch, weights, sums, squared_norms);
                     } else {
                       const auto evaluated = micro_batch();
                       detail::double_backward(evaluated.pass(), terms_, strengths, weights, loop.parameters(), sums,
                                               squared_norms);
                     }
                   });
      report.step = step_;
      report.gradient_norm = detail::squared_norm(sums, report.loss.options()).sqrt();
      if (options_.check_finite == CheckFinite::always ||
          (options_.check_finite == CheckFinite::on_cpu && report.loss.is_cpu())) {
        report.throw_if_not_finite();
      }
      detail::add_to_grad(loop.parameters().tensors, sums);
      ++step_;
      return report;
    } catch (...) {
      loop.restore();
      throw;
    }
  }

  /// How many steps were taken: what a strength schedule is asked with.
  [[nodiscard]] std::int64_t step() const noexcept { return step_; }
  /// Sets the step, for a run that resumes.
  void set_step(std::int64_t step) noexcept { step_ = step; }

  [[nodiscard]] const RegularizerOptions& options() const noexcept { return options_; }

 private:
  Handle handle_;
  Loss loss_;
  Terms terms_;
  RegularizerOptions options_;
  std::int64_t step_ = 0;
};

template <class M, class Loss, class PenaltyOrSum>
Regularizer(M&&, Loss, PenaltyOrSum, RegularizerOptions = {})
    -> Regularizer<detail::HandleFor<M>, Loss, detail::TermsFor<PenaltyOrSum>>;

}  // namespace microreg
