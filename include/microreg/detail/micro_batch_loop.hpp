/// @file
/// The loop that `Regularizer` and `measure` share: checks, forward and loss of each micro-batch, and the report.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
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
  void restore() { snapshot_.restore(); }

  /// Runs `differentiate(pass, weight, squared_norms)` on every micro-batch and collects the report.
  template <class Loss, class... P, class Differentiate>
  Report run(Loss& loss, const std::tuple<Weighted<P>...>& terms, std::span<const double> strengths,
             const Differentiate& differentiate) {
    const at::AutoGradMode enable_grad(true);
    const std::int64_t count = micro_batches_.count();
    std::vector<at::Tensor> losses;
    std::vector<std::vector<at::Tensor>> squared_norms(sizeof...(P));
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t size = micro_batches_.size(i);
      const Input input = slice(input_, micro_batches_.begin(i), size);
      const Target target = slice(target_, micro_batches_.begin(i), size);
      const auto output = handle_.forward(input);
      const at::Tensor mean_loss = evaluate(loss, output, target, size);
      std::vector<at::Tensor> squared(sizeof...(P));
      differentiate(ForwardPass<Input, std::remove_cvref_t<decltype(output)>, Target>{input, output, target, mean_loss,
                                                                                      options_.generator},
                    micro_batches_.weight(i), squared);
      losses.push_back(mean_loss.detach());
      for (std::size_t p = 0; p < squared.size(); ++p) {
        squared_norms[p].push_back(std::move(squared[p]));
      }
    }
    return report(terms, strengths, losses, squared_norms);
  }

 private:
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

  template <class Loss, class Output>
  at::Tensor evaluate(Loss& loss, const Output& output, const Target& target, std::int64_t size) const {
    static_assert(
        requires {
          { loss(output, target) } -> std::convertible_to<at::Tensor>;
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
    at::Tensor value = loss(output, target);
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
    return options_.reduction == Reduction::sum ? value / size : value;
  }

  template <class... P>
  Report report(const std::tuple<Weighted<P>...>& terms, std::span<const double> strengths,
                const std::vector<at::Tensor>& losses,
                const std::vector<std::vector<at::Tensor>>& squared_norms) const {
    const at::NoGradGuard no_grad;
    Report result;
    result.samples = micro_batches_.begin(micro_batches_.count() - 1) + micro_batches_.size(micro_batches_.count() - 1);
    result.micro_batch_losses = at::stack(losses);
    result.loss = weighted_sum(result.micro_batch_losses);
    const std::vector<std::string> names = std::apply(
        [](const auto&... term) { return std::vector<std::string>{std::string(term.penalty.name())...}; }, terms);
    for (std::size_t p = 0; p < names.size(); ++p) {
      const at::Tensor squared = at::stack(squared_norms[p]);
      result.penalties.push_back({names[p], strengths[p], weighted_sum(squared), squared.sqrt()});
    }
    return result;
  }

  /// sum over M of weight(M) * values[M]. All weights but the last are equal, so no host tensor is made.
  at::Tensor weighted_sum(const at::Tensor& values) const {
    const std::int64_t last = micro_batches_.count() - 1;
    const at::Tensor tail = values[last] * micro_batches_.weight(last);
    return last == 0 ? tail : values.narrow(0, 0, last).sum() * micro_batches_.weight(0) + tail;
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
