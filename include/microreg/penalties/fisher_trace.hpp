/// @file
/// FisherTrace (FT): the squared norm of the loss gradient with labels drawn from the model itself.
#pragma once

#include <microreg/distributions.hpp>
#include <microreg/squared_gradient_norm.hpp>

#include <optional>
#include <string_view>
#include <utility>
#include <vector>

namespace microreg {

/// The squared norm of the gradient of the micro-batch mean negative log-likelihood of labels that are drawn from the
/// model's own predictive distribution,
///
///     R_M(w) = || grad_w mean over x in M of -log p_w(y^ | x) ||^2,   y^ ~ p_w(. | x),
///
/// the draw without a gradient (arXiv:2211.15853, equation 4). Its expectation over y^ is tr(F) / |M|, where F is the
/// Fisher information averaged over the micro-batch: **the useful strength grows with the micro-batch size.**
///
/// The output must be floating-point, [M, C, ...] for Categorical; dense outputs [M, C, H, W] count each position as a
/// sample. Labels come from `Regularizer`'s generator, otherwise from the default one of the output's device. Cost in
/// `Regularizer`: 3.0 plain steps in exact arithmetic. The true labels and the training loss are not used.
///
/// ```cpp
/// microreg::FisherTrace<microreg::Bernoulli> penalty;
/// auto value = penalty(model->forward(x), model->parameters());
/// ```
template <class D = Categorical>
struct FisherTrace {
  static_assert(PredictiveDistribution<D>,
                "microreg: FisherTrace needs a distribution that offers sample(output, generator) and "
                "negative_log_likelihood(output, labels), both returning a torch::Tensor: Categorical, Bernoulli, "
                "Gaussian, or a Distribution of two callables");
  D distribution = {};

  [[nodiscard]] std::string_view name() const noexcept { return "fisher_trace"; }

  template <class Pass>
    requires std::convertible_to<decltype(std::declval<const Pass&>().output), const at::Tensor&>
  [[nodiscard]] at::Tensor probe(const Pass& pass) const {
    return probe_of(pass.output, pass.generator);
  }

  /// The penalty of `output`; see squared_gradient_norm() for what it costs and throws.
  [[nodiscard]] at::Tensor operator()(const at::Tensor& output, const std::vector<at::Tensor>& parameters,
                                      const std::optional<at::Generator>& generator = std::nullopt) const {
    return squared_gradient_norm(probe_of(output, generator), parameters, name());
  }

 private:
  [[nodiscard]] at::Tensor probe_of(const at::Tensor& output, const std::optional<at::Generator>& generator) const {
    const at::Tensor& logits = differentiable_output(output, name());
    return distribution.negative_log_likelihood(logits, distribution.sample(logits, generator));
  }
};
template <class D>
FisherTrace(D) -> FisherTrace<D>;
FisherTrace() -> FisherTrace<Categorical>;

}  // namespace microreg
