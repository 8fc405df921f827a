/// @file
/// Penalised: the loop that you have, with `loss.backward()` replaced.
#pragma once

#include <microreg/any_penalty.hpp>
#include <microreg/estimator.hpp>
#include <microreg/micro_batches.hpp>
#include <microreg/model.hpp>
#include <microreg/options.hpp>
#include <microreg/parameters.hpp>
#include <microreg/penalty.hpp>
#include <microreg/report.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/strength.hpp>

#include <concepts>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI {

namespace detail {
struct SnapshotMemory;
}

/// The options of Penalised, each as in RegularizerOptions.
struct PenalisedOptions {
  Strength strength = 1.0;         ///< factor on the penalties: a number or a schedule over step()
  Estimator estimator = Exact{};   ///< a difference needs the form of backward() that takes a closure
  Sampling sampling = {};          ///< among the parts of a step; of a single one, `share` is its chance
  ParameterSelection select = {};  ///< which parameters count in the penalties; all of them if empty
  std::optional<at::Generator> generator = std::nullopt;  ///< of labels and directions; the default one if empty
  OtherLeaves other_leaves = OtherLeaves::ignored;  ///< the parameters are named here; `refused` finds forgotten ones
  NonFinite non_finite = NonFinite::error;         ///< skip_penalty keeps the graph of a given loss until the loss goes
  CheckFinite check_finite = CheckFinite::on_cpu;  ///< in each call of backward()
  bool fused = true;                               ///< the fast double backward of microreg/fused, where it applies
  LossScale loss_scale = 1;                        ///< a number where a step of the optimizer has several parts
  bool gradient_ratio = false;                     ///< for Report::gradient_ratio; one backward pass more
  bool advance = true;                             ///< count a step with its last part; false: call advance()
};

/// What the penalties of a Penalised may read: the loss, and what backward() is handed beside it.
struct PassTensors {
  at::Tensor loss;         ///< a scalar with a graph
  at::Tensor output = {};  ///< what the model returned, for FisherTrace and the Jacobians
  at::Tensor input = {};   ///< what it was called with, a leaf with requires_grad, for InputJacobian
};

/// Takes the place of `loss.backward()` in a loop of one's own: adds to `.grad` the gradient of
///
///     loss + strength * R,   R = || grad_w s ||^2,
///
/// for one micro-batch, whose loss (and output) the loop has computed as it always did. Everything else is as in
/// Regularizer: sum of penalties, schedules, report, checks, exact by double backward, and after an error nothing has
/// changed but what the loop's own forward pass did before (with a closure and the model's buffers: nothing).
///
/// ```cpp
/// microreg::Penalised penalised(model->parameters(), microreg::GradientNorm{}, {.strength = 0.01});
/// auto loss = criterion(model->forward(images), labels);
/// auto report = penalised.backward(loss);  // instead of loss.backward()
/// ```
///
/// Several micro-batches for one step of the optimizer come from micro_batches(), whose `part` carries the weight. A
/// closure in place of the loss is needed by the differences, which run it again, and has one more merit: the fused
/// double backward of group normalisation begins in the forward pass, and sees it there.
class Penalised {
 public:
  /// `parameters` are all that receive a gradient; those that do not require one are passed over.
  Penalised(std::vector<at::Tensor> parameters, AnyPenalty<> penalty, PenalisedOptions options = {});
  /// The same with the names and the buffers of a model, of any kind that Regularizer takes, or of several modules().
  /// The differences need the buffers, which their further passes must not move.
  template <class M>
    requires(Model<M> || std::same_as<std::remove_cvref_t<M>, Modules>)
  Penalised(M&& model, AnyPenalty<> penalty, PenalisedOptions options = {})
      : Penalised(std::vector<at::Tensor>(), std::move(penalty), std::move(options)) {
    const auto held = [&] {
      if constexpr (std::same_as<std::remove_cvref_t<M>, Modules>) {
        return model;
      } else {
        return detail::make_handle(std::forward<M>(model));
      }
    }();
    named_parameters_ = [held] { return held.parameters(); };
    buffers_ = [held] { return held.buffers(); };
  }

  /// Adds the gradient of loss and penalties to `.grad`. `output` is for penalties that read it. Throws ModelError (no
  /// graph, no parameter, an operation that cannot be differentiated), OptionError (a difference), NonFiniteError.
  Report backward(const at::Tensor& loss, const at::Tensor& output = {}) { return backward(Part{}, loss, output); }
  /// The same for one of several parts of a step. Throws OptionError for an index out of range, a weight that is not
  /// above 0, and several parts with a DynamicLossScale.
  Report backward(const Part& part, const at::Tensor& loss, const at::Tensor& output = {}) {
    return backward(part, PassTensors{loss, output});
  }
  /// The same, with the input beside loss and output.
  Report backward(const PassTensors& pass) { return backward(Part{}, pass); }
  /// The same for one of several parts.
  Report backward(const Part& part, const PassTensors& pass);

  /// The same, where `closure()` does forward pass and loss and returns the loss, {loss, output} or PassTensors.
  template <class Closure>
    requires std::invocable<Closure&>
  Report backward(Closure closure) {
    return backward(Part{}, std::move(closure));
  }
  /// The same for one of several parts.
  template <class Closure>
    requires std::invocable<Closure&>
  Report backward(const Part& part, Closure closure) {
    return run(part, [&closure] { return tensors(closure()); }, /*keeps_graph=*/false);
  }

  /// How many steps were taken. A mini-batch of several parts is one step, counted with its last part.
  [[nodiscard]] std::int64_t step() const noexcept { return progress_.step; }
  void set_step(std::int64_t step) noexcept { progress_.step = step; }  ///< for a run that resumes
  void advance() noexcept { ++progress_.step; }  ///< counts a step, where `.advance = false` keeps backward() from it
  /// How many calls NonFinite::skip_step left out so far.
  [[nodiscard]] std::int64_t skipped() const { return progress_.all_skipped(); }

 private:
  template <class Result>
  static PassTensors tensors(const Result& result) {
    if constexpr (std::is_convertible_v<const Result&, PassTensors>) {
      return result;
    } else if constexpr (std::is_convertible_v<const Result&, at::Tensor>) {
      return {result};
    } else {
      static_assert(
          requires { std::tuple_size<Result>::value; },
          "microreg: the closure must return the loss, a pair or tuple {loss, output}, or PassTensors");
      return std::apply([](const at::Tensor& loss, const at::Tensor& output) { return PassTensors{loss, output}; },
                        result);
    }
  }

  Report run(const Part& part, const std::function<PassTensors()>& pass, bool keeps_graph);

  std::function<std::vector<NamedParameter>()> named_parameters_;
  std::function<std::vector<at::Tensor>()> buffers_;  // empty: not known
  AnyPenalty<> penalty_;
  RegularizerOptions options_;
  detail::Progress progress_;
  detail::OwnMemory memory_;
};

}  // namespace microreg::inline MICROREG_ABI

#if !defined(MICROREG_COMPILED)
#include <microreg/definitions/penalised.hpp>
#endif
