/// @file
/// FisherTrace (FT): the squared norm of the loss gradient with labels drawn from the model itself.
#pragma once

#include <ATen/ATen.h>
#include <microreg/distributions.hpp>
#include <microreg/penalties/expectation.hpp>
#include <microreg/squared_gradient_norm.hpp>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI {

/// The squared norm of the gradient of the micro-batch mean negative log-likelihood of labels that are drawn from the
/// model's own predictive distribution,
///
///     R_M(w) = || grad_w mean over x in M of -log p_w(y^ | x) ||^2,   y^ ~ p_w(. | x),
///
/// the draw without a gradient (arXiv:2211.15853, equation 4). Its expectation over y^ is tr(F) / |M|, where F is the
/// Fisher information averaged over the micro-batch: **the useful strength grows with the micro-batch size.**
///
/// With `.draws = K`, R_M is the mean over K independent draws. With `.expectation = Expectation::exact` it is that
/// expectation itself, and so is its gradient, by one probe per sample and class: |M| * C of them.
///
/// The output must be floating-point, [M, C, ...] for Categorical; dense outputs [M, C, H, W] count each position as a
/// sample. Labels come from `Regularizer`'s generator, otherwise from the default one of the output's device. Cost in
/// `Regularizer`: 1 + 2k plain steps in exact arithmetic for k probes. The true labels and the training loss are not
/// used.
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
  D distribution = {};     ///< how the output is read, with its options: `Categorical{.class_dimension = -1}`
  std::int64_t draws = 1;  ///< K, at least 1; not used by Expectation::exact
  /// By draws, or exactly (Categorical only, |M| * C probes).
  Expectation expectation = Expectation::sampled;

  [[nodiscard]] std::string_view name() const noexcept { return "fisher_trace"; }  ///< "fisher_trace" in Report

  /// s_k = (1 / K)^(1/2) * mean over x in M of -log p(y^_k | x), k = 1 ... K; with Expectation::exact what the
  /// distribution's expected_probes() gives. Throws OptionError for `draws` below 1 or a distribution without that
  /// member, ModelError unless the output is floating-point, [M, ...], or as Categorical::check_target() does.
  template <class Pass>
    requires std::convertible_to<decltype(std::declval<const Pass&>().output), const at::Tensor&>
  [[nodiscard]] std::vector<at::Tensor> probes(const Pass& pass) const {
    if constexpr (requires { distribution.check_target(pass.output, pass.target); }) {
      distribution.check_target(pass.output, pass.target);
    }
    return probes_of(pass.output, pass.generator, [&](const auto& sample) { return pass.draw(sample); });
  }

  /// The penalty of `output`; see squared_gradient_norm() for what it costs and throws.
  [[nodiscard]] at::Tensor operator()(const at::Tensor& output, const std::vector<at::Tensor>& parameters,
                                      const std::optional<at::Generator>& generator = std::nullopt) const {
    return detail::summed_squared_gradient_norms(
        probes_of(output, generator, [](const auto& sample) { return at::Tensor(sample()); }), parameters, name());
  }

 private:
  template <class Draw>
  [[nodiscard]] std::vector<at::Tensor> probes_of(const at::Tensor& output,
                                                  const std::optional<at::Generator>& generator,
                                                  const Draw& draw) const {
    const at::Tensor& logits = differentiable_output(output, name());
    if (expectation == Expectation::exact) {
      return expected_probes(logits, draw);
    }
    detail::check_count(draws, "FisherTrace.draws");
    std::vector<at::Tensor> probes;
    for (std::int64_t k = 0; k < draws; ++k) {
      const at::Tensor labels = draw([&] { return distribution.sample(logits, generator); });
      const at::Tensor loss = distribution.negative_log_likelihood(logits, labels);
      probes.push_back(draws == 1 ? loss : loss / std::sqrt(static_cast<double>(draws)));
    }
    return probes;
  }

  template <class Draw>
  [[nodiscard]] std::vector<at::Tensor> expected_probes(const at::Tensor& logits, const Draw& hold) const {
    if constexpr (requires { distribution.expected_probes(logits, hold); }) {
      return distribution.expected_probes(logits, hold);
    } else {
      throw OptionError(
          "FisherTrace.expectation is Expectation::exact, which only Categorical offers; use .draws = K instead, or "
          "give your distribution a member expected_probes(output, hold), as Categorical has it");
    }
  }
};
#if defined(__clang__) && __clang_major__ < 17  // which does not deduce from aggregates: FisherTrace<>{...} there
template <class D>
FisherTrace(D) -> FisherTrace<D>;
template <class D>
FisherTrace(D, std::int64_t) -> FisherTrace<D>;
template <class D>
FisherTrace(D, std::int64_t, Expectation) -> FisherTrace<D>;
FisherTrace() -> FisherTrace<Categorical>;
#endif

}  // namespace microreg::inline MICROREG_ABI
