/// @file
/// InputJacobian: a penalty on the derivative of the model's output by its input.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <microreg/penalties/expectation.hpp>
#include <microreg/squared_gradient_norm.hpp>

#include <cmath>
#include <concepts>
#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI {

/// The squared Frobenius norm of the Jacobian by the input, averaged over the micro-batch,
///
///     R_M(w) = mean over x in M of || df_w(x)/dx ||_F^2,
///
/// (Hoffman, Roberts, Yaida, arXiv:1908.02729; there it stands with a factor 1/2, here it does not). With projections
/// it is estimated without bias: for each sample C * || v^T df(x)/dx ||^2, v uniform on the unit sphere of R^C,
/// averaged over `.projections` independent v. With `.expectation = Expectation::exact` it takes one probe per output
/// value.
///
/// The derivative is by every floating-point tensor of the input, which is put into the graph as a view; the
/// parameters' selection plays no part. With batch normalisation in training mode a sample's output depends on its
/// neighbours, whose derivatives are then counted too. The output must be floating-point, [M, ...], and is read as one
/// vector a sample of C values. Cost in `Regularizer`: 1 + 2k plain steps in exact arithmetic for k probes. Neither
/// labels nor the loss are used.
///
/// ```cpp
/// auto x = images.clone().requires_grad_(true);
/// auto value = microreg::InputJacobian{}(model->forward(x), {x});
/// ```
struct InputJacobian {
  static constexpr bool differentiates_input = true;  ///< probes are differentiated by it, not by the parameters

  std::int64_t projections = 1;                    ///< at least 1; not used by Expectation::exact
  Expectation expectation = Expectation::sampled;  ///< exact: C probes, one for each output value

  [[nodiscard]] std::string_view name() const noexcept { return "input_jacobian"; }  ///< "input_jacobian" in Report

  /// s_k = (C / (K |M|))^(1/2) * sum over x in M of v_kx^T f(x), k = 1 ... K, `.projections`; with Expectation::exact
  /// s_c = (1 / |M|)^(1/2) * sum over x in M of f_c(x), c = 1 ... C. Throws OptionError for `projections` below 1,
  /// ModelError unless the output is floating-point, [M, ...].
  template <class Pass>
    requires std::convertible_to<decltype(std::declval<const Pass&>().output), const at::Tensor&>
  [[nodiscard]] std::vector<at::Tensor> probes(const Pass& pass) const {
    return probes_of(pass.output, pass.generator, [&](const auto& sample) { return pass.draw(sample); });
  }

  /// The penalty of `output` by `inputs`, the tensors with requires_grad that the model was called with. See
  /// squared_gradient_norm() for what it costs and throws.
  [[nodiscard]] at::Tensor operator()(const at::Tensor& output, const std::vector<at::Tensor>& inputs,
                                      const std::optional<at::Generator>& generator = std::nullopt) const {
    return detail::summed_squared_gradient_norms(
        probes_of(output, generator, [](const auto& sample) { return at::Tensor(sample()); }), inputs, name());
  }

 private:
  template <class Draw>
  [[nodiscard]] std::vector<at::Tensor> probes_of(const at::Tensor& output,
                                                  const std::optional<at::Generator>& generator,
                                                  const Draw& draw) const {
    const at::Tensor values = differentiable_output(output, name()).reshape({output.size(0), -1});
    const auto samples = static_cast<double>(values.size(0));
    if (expectation == Expectation::exact) {
      return (values.sum(0) / std::sqrt(samples)).unbind();
    }
    detail::check_count(projections, "InputJacobian.projections");
    const double scale = std::sqrt(static_cast<double>(values.size(1)) / (samples * static_cast<double>(projections)));
    std::vector<at::Tensor> probes;
    for (std::int64_t k = 0; k < projections; ++k) {
      const at::Tensor direction = draw([&] {
        const at::NoGradGuard no_grad;
        const at::Tensor normal = at::empty_like(values).normal_(0, 1, generator);
        return normal / normal.norm(2, 1, /*keepdim=*/true);
      });
      probes.push_back((values * direction).sum() * scale);
    }
    return probes;
  }
};

}  // namespace microreg::inline MICROREG_ABI
