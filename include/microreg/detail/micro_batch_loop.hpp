/// @file
/// The loop that `Regularizer` and `measure` share: checks, forward and loss of each micro-batch, and the report.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <microreg/detail/penalised.hpp>
#include <microreg/detail/snapshot.hpp>
#include <microreg/micro_batch.hpp>
#include <microreg/model.hpp>
#include <microreg/options.hpp>
#include <microreg/parameters.hpp>
#include <microreg/penalty.hpp>
#include <microreg/report.hpp>

#include <span>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace microreg::detail {

template <class Expression>
auto as_terms(Expression expression) {
  static_assert(PenaltyExpression<Expression>,
                "microreg: this is not a penalty: pass GradientNorm{}, FisherTrace{}, a sum such as 0.01 * "
                "GradientNorm{} + 1e-3 * UnitJacobian{}, or SquaredGradientNorm{probe} for a probe of your own; a type "
                "of your own must offer name() and probe(pass)");
  return as_sum(std::move(expression)).terms;
}

template <class Expression>
using TermsFor = decltype(as_terms(std::declval<Expression>()));

/// strength(step) of every term, times the common factor.
template <class... P>
std::vector<double> strengths_at(const std::tuple<Weighted<P>...>& terms, const Strength& factor, std::int64_t step) {
  const double common = factor.at(step);
  return std::apply([&](const auto&... term) { return std::vector<double>{common * term.strength.at(step)...}; },
                    terms);
}

/// The device that all of `tensors` share, if they do.
inline std::optional<c10::Device> common_device(const std::vector<at::Tensor>& tensors) {
  const c10::Device device = tensors.front().device();
  for (const at::Tensor& tensor : tensors) {
    if (tensor.device() != device) {
      return std::nullopt;
    }
  }
  return device;
}

/// Adds `sums` to the `.grad` fields of `parameters`, outside of any graph.
inline void add_to_grad(const std::vector<at::Tensor>& parameters, const std::vector<at::Tensor>& sums) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> into;
  std::vector<at::Tensor> from;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    if (!sums[i].defined()) {
      continue;
    }
    at::Tensor& grad = parameters[i].mutable_grad();
    if (grad.defined()) {
      into.push_back(grad);
      from.push_back(sums[i]);
    } else {
      grad = sums[i];
    }
  }
  if (!into.empty()) {
    at::_foreach_add_(into, from);
  }
}

/// One evaluation of a micro-batch: what the model returned and the mean loss, with their graph.
template <class Input, class Output, class Target>
struct Evaluated {
  Input input;
  Output output;
  at::Tensor loss;
  const Target& target;
  const std::optional<at::Generator>& generator;

  [[nodiscard]] ForwardPass<Input, Output, Target> pass(Draws* draws = nullptr) const {
    return {input, output, target, loss, generator, draws};
  }
};

/// One micro-batch, as an estimator sees it: evaluated by calling it, as often as the estimator needs.
template <class Handle, class Loss, class Input, class Target>
class MicroBatch {
 public:
  MicroBatch(Handle& handle, Loss& loss, const RegularizerOptions& options, const Snapshot& snapshot, Input input,
             Target target, std::int64_t size)
      : handle_(handle),
        loss_(loss),
        options_(options),
        snapshot_(snapshot),
        input_(std::move(input)),
        target_(std::move(target)),
        size_(size) {}

  /// Forward pass and loss.
  [[nodiscard]] auto operator()() const { return (*this)(input_); }

  /// The same at another input of the same structure.
  [[nodiscard]] auto operator()(const Input& input) const {
    const auto output = handle_.forward(input);
    const at::Tensor loss = mean_loss(output);
    if (!first_loss_.defined()) {
      first_loss_ = loss.detach();
    }
    return Evaluated<Input, std::remove_cvref_t<decltype(output)>, Target>{input, output, loss, target_,
                                                                           options_.generator};
  }

  [[nodiscard]] const Input& input() const noexcept { return input_; }
  /// Buffers and generators as they are now.
  [[nodiscard]] Snapshot snapshot() const { return snapshot_.now(); }
  /// Generators as they are now.
  [[nodiscard]] GeneratorStates generators() const { return snapshot_.generators().now(); }
  /// The mean loss of the first evaluation, without a graph.
  [[nodiscard]] const at::Tensor& loss() const noexcept { return first_loss_; }

 private:
  template <class Output>
  at::Tensor mean_loss(const Output& output) const {
    static_assert(
        requires {
          { loss_(output, target_) } -> std::convertible_to<at::Tensor>;
        },
        "microreg: the loss cannot be called as loss(output, target) with what the model returns and the "
        "target batch, or it does not return a torch::Tensor");
    if constexpr (is_tensor<Output>) {
      if (output.defined() && !output.is_floating_point() && !output.is_complex()) {
        throw ModelError(c10::str("the model's output is ", c10::toString(output.scalar_type()), " of shape ",
                                  output.sizes(),
                                  ", which has no gradient; return floating-point logits or "
                                  "predictions"));
      }
    }
    at::Tensor value = loss_(output, target_);
    if (!value.defined() || value.dim() != 0) {
      throw ModelError(c10::str("the loss has shape ", value.defined() ? c10::str(value.sizes()) : "(undefined)",
                                ", it must be a scalar: reduce it to the mean over samples, or to the sum with "
                                ".reduction = Reduction::sum"));
    }
    if (!value.is_floating_point() || !value.requires_grad()) {
      throw ModelError(c10::str("the loss (", c10::toString(value.scalar_type()),
                                ") carries no graph; compute it from the model's output without detach(), NoGradGuard "
                                "or InferenceMode"));
    }
    return options_.reduction == Reduction::sum ? value / size_ : value;
  }

  Handle& handle_;
  Loss& loss_;
  const RegularizerOptions& options_;
  const Snapshot& snapshot_;
  Input input_;
  Target target_;
  std::int64_t size_;
  mutable at::Tensor first_loss_;
};

template <class Handle, class Input, class Target>
class MicroBatchLoop {
 public:
  /// Checks the batch and remembers what a failed step must put back. Throws before anything is changed.
  MicroBatchLoop(Handle& handle, const RegularizerOptions& options, const Input& input, const Target& target)
      : handle_(handle),
        options_(options),
        input_(input),
        target_(target),
        parameters_(trainable(handle.parameters(), options.select)),
        micro_batches_(count_samples(), options.micro_batch_size, options.weighting),
        snapshot_(handle.buffers(), parameters_.tensors.front().device(), options.generator) {}

  [[nodiscard]] const Parameters& parameters() const noexcept { return parameters_; }
  [[nodiscard]] std::int64_t count() const noexcept { return micro_batches_.count(); }
  void restore() { snapshot_.restore(); }

  /// Runs `estimate(micro_batch, weights, squared_norms)` on every micro-batch and collects the report. `estimate`
  /// evaluates the micro-batch at least once, and fills `squared_norms`, one a penalty, where weights.penalty is not 0.
  template <class Loss, class... P, class Estimate>
  Report run(Loss& loss, const std::tuple<Weighted<P>...>& terms, std::span<const double> strengths,
             const Penalised& penalised, const Estimate& estimate) {
    const at::AutoGradMode enable_grad(true);
    std::vector<at::Tensor> losses;
    std::vector<std::vector<at::Tensor>> squared_norms(sizeof...(P));
    for (std::int64_t i = 0; i < count(); ++i) {
      const std::int64_t size = micro_batches_.size(i);
      Input input = slice(input_, micro_batches_.begin(i), size);
      if constexpr ((differentiates_input<P> || ...)) {
        require_input_gradient(input);
      }
      const MicroBatch<Handle, Loss, Input, Target> micro_batch(handle_, loss, options_, snapshot_, std::move(input),
                                                                slice(target_, micro_batches_.begin(i), size), size);
      const bool is_penalised = penalised.chosen[static_cast<std::size_t>(i)];
      const double weight = micro_batches_.weight(i);
      std::vector<at::Tensor> squared(sizeof...(P));
      estimate(micro_batch, MicroBatchWeights{weight, is_penalised ? weight * penalised.factor : 0.0}, squared);
      losses.push_back(micro_batch.loss());
      if (is_penalised) {
        for (std::size_t p = 0; p < squared.size(); ++p) {
          squared_norms[p].push_back(std::move(squared[p]));
        }
      }
    }
    return report(terms, strengths, penalised, losses, squared_norms);
  }

 private:
  /// Makes the floating-point tensors leaves of the graph, as views: the user's own tensors are left alone.
  static void require_input_gradient(Input& input) {
    for_each_tensor(input, "input", [](at::Tensor& tensor, const std::string&) {
      if (tensor.is_floating_point() && !tensor.requires_grad()) {
        tensor = tensor.detach().requires_grad_(true);
      }
    });
  }

  std::int64_t count_samples() const {
    const std::int64_t samples = sample_count(input_, "input");
    const std::int64_t targets = sample_count(target_, "target");
    if (samples != targets) {
      throw BatchError(c10::str("first dimensions differ: input has ", samples, " samples, target has ", targets,
                                "; pass the inputs and targets of the same samples"));
    }
    if (samples == 0) {
      throw BatchError("the mini-batch is empty: input has 0 samples; skip empty batches in the data loader");
    }
    check_devices();
    return samples;
  }

  void check_devices() const {
    const auto device = common_device(parameters_.tensors);
    if (!device.has_value()) {
      return;  // A model spread over devices knows where its inputs go.
    }
    const auto check = [&](const at::Tensor& tensor, const std::string& path) {
      if (tensor.device() != *device) {
        throw BatchError(c10::str(path, " is on ", tensor.device(), ", the model on ", *device, "; move it with .to(",
                                  *device, ")"));
      }
    };
    Input input = input_;
    for_each_tensor(input, "input", check);
    Target target = target_;
    for_each_tensor(target, "target", check);
    if (options_.generator.has_value() && options_.generator->device().type() != device->type()) {
      throw OptionError(c10::str("generator is on ", options_.generator->device(), ", the model on ", *device,
                                 "; make the generator on the model's device"));
    }
  }

  template <class... P>
  Report report(const std::tuple<Weighted<P>...>& terms, std::span<const double> strengths, const Penalised& penalised,
                const std::vector<at::Tensor>& losses,
                const std::vector<std::vector<at::Tensor>>& squared_norms) const {
    const at::NoGradGuard no_grad;
    Report result;
    result.samples = micro_batches_.begin(count() - 1) + micro_batches_.size(count() - 1);
    result.micro_batch_losses = at::stack(losses);
    result.loss = weighted_sum(result.micro_batch_losses, true);
    for (std::int64_t i = 0; i < count(); ++i) {
      if (penalised.chosen[static_cast<std::size_t>(i)]) {
        result.penalised.push_back(i);
      }
    }
    std::size_t index = 0;
    const auto add = [&](const auto& penalty, bool squared) {
      const std::size_t p = index++;
      const at::Tensor values =
          squared_norms[p].empty() ? at::empty({0}, result.loss.options()) : at::stack(squared_norms[p]);
      const at::Tensor norms = values.sqrt();
      const at::Tensor value = weighted_sum(squared ? values : norms, penalised.chosen.back());
      result.penalties.push_back(
          {std::string(penalty.name()), strengths[p], penalised.factor == 1 ? value : value * penalised.factor, norms});
    };
    std::apply([&](const auto&... term) { (add(term.penalty, is_squared<P>), ...); }, terms);
    return result;
  }

  /// The sum of weight(M) * values[M]. All weights but that of the last micro-batch, whose value is the last one if
  /// `with_last`, are equal, so no host tensor is made.
  at::Tensor weighted_sum(const at::Tensor& values, bool with_last) const {
    const std::int64_t full = values.size(0) - (with_last ? 1 : 0);
    if (!with_last) {
      return values.sum() * micro_batches_.weight(0);
    }
    const at::Tensor tail = values[full] * micro_batches_.weight(count() - 1);
    return full == 0 ? tail : values.narrow(0, 0, full).sum() * micro_batches_.weight(0) + tail;
  }

  Handle& handle_;
  const RegularizerOptions& options_;
  const Input& input_;
  const Target& target_;
  Parameters parameters_;
  MicroBatches micro_batches_;
  Snapshot snapshot_;
};

}  // namespace microreg::detail
