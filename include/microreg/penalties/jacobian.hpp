/// @file
/// AverageJacobian (AJ), UnitJacobian (UJ) and JacobianNorm: penalties on the parameter Jacobian of the model's output.
///
/// J-bar is the Jacobian of the mean output, [C, number of parameters], row c = grad_w mean over x in M of f_c(x).
/// Outputs of more dimensions are read as one vector a sample, so C is the number of output values per sample.
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

namespace detail {
template <class Pass>
concept HasTensorOutput = std::convertible_to<decltype(std::declval<const Pass&>().output), const at::Tensor&>;
}

/// The squared norm of the gradient of the summed mean output,
///
///     R_M(w) = || grad_w sum over c of mean over x in M of f_c(x) ||^2 = || 1^T J-bar ||^2.
///
/// As in the authors' code (arXiv:2211.15853, section 3, "average Jacobian") this is the norm of the sum of the rows of
/// J-bar, not its Frobenius norm. The output must be floating-point, [M, ...]. Cost in `Regularizer`: 3.0 plain steps
/// in exact arithmetic. Neither labels nor the loss are used.
///
/// ```cpp
/// auto value = microreg::AverageJacobian{}(model->forward(x), model->parameters());
/// ```
struct AverageJacobian {
  [[nodiscard]] std::string_view name() const noexcept { return "average_jacobian"; }  ///< "average_jacobian" in Report

  /// s_M = sum over c of mean over x in M of f_c(x). Throws ModelError unless the output is floating-point, [M, ...].
  template <detail::HasTensorOutput Pass>
  [[nodiscard]] at::Tensor probe(const Pass& pass) const {
    return probe_of(pass.output);
  }

  /// The penalty of `output`; see squared_gradient_norm() for what it costs and throws.
  [[nodiscard]] at::Tensor operator()(const at::Tensor& output, const std::vector<at::Tensor>& parameters) const {
    return squared_gradient_norm(probe_of(output), parameters, name());
  }

 private:
  [[nodiscard]] at::Tensor probe_of(const at::Tensor& output) const {
    return differentiable_output(output, name()).sum() / output.size(0);
  }
};

/// The squared norm of the gradient of a random unit combination of the mean outputs,
///
///     R_M(w) = || grad_w u^T mean over x in M of f(x) ||^2 = || u^T J-bar ||^2,   u uniform on the unit sphere of R^C,
///
/// with one fresh u for each micro-batch (arXiv:2211.15853, section 3, "unit Jacobian"). Its expectation over u is the
/// squared Frobenius norm of J-bar divided by C. With `.directions = K`, R_M is the mean over K independent u; with
/// `.scale_by_outputs = true` it is multiplied by C, and so estimates JacobianNorm without bias.
///
/// The output must be floating-point, [M, ...]; u comes from `Regularizer`'s generator, otherwise from the default one
/// of the output's device. Cost in `Regularizer`: 1 + 2K plain steps in exact arithmetic. Neither labels nor the loss
/// are used.
///
/// ```cpp
/// auto value = microreg::UnitJacobian{}(model->forward(x), model->parameters());
/// ```
struct UnitJacobian {
  std::int64_t directions = 1;    ///< K, at least 1
  bool scale_by_outputs = false;  ///< multiply by C, the number of output values per sample

  [[nodiscard]] std::string_view name() const noexcept { return "unit_jacobian"; }  ///< "unit_jacobian" in Report

  /// s_k = (1 / K)^(1/2) * u_k^T mean over x in M of f(x), k = 1 ... K; (C / K)^(1/2) with `.scale_by_outputs`. Throws
  /// OptionError for `directions` below 1, ModelError unless the output is floating-point, [M, ...].
  template <detail::HasTensorOutput Pass>
  [[nodiscard]] std::vector<at::Tensor> probes(const Pass& pass) const {
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
    detail::check_count(directions, "UnitJacobian.directions");
    const at::Tensor mean = differentiable_output(output, name()).reshape({output.size(0), -1}).mean(0);
    const double outputs = scale_by_outputs ? static_cast<double>(mean.size(0)) : 1.0;
    const double scale = std::sqrt(outputs / static_cast<double>(directions));
    std::vector<at::Tensor> probes;
    for (std::int64_t k = 0; k < directions; ++k) {
      const at::Tensor u = draw([&] { return direction(mean, generator); });
      probes.push_back(scale == 1.0 ? mean.dot(u) : mean.dot(u) * scale);
    }
    return probes;
  }

  /// Uniform on the unit sphere: a standard normal vector, divided by its norm.
  static at::Tensor direction(const at::Tensor& like, const std::optional<at::Generator>& generator) {
    const at::NoGradGuard no_grad;
    const at::Tensor normal = at::empty_like(like).normal_(0, 1, generator);
    return normal / normal.norm();
  }
};

/// The squared Frobenius norm of the Jacobian of the mean output, exactly,
///
///     R_M(w) = || J-bar ||_F^2 = sum over c of || grad_w mean over x in M of f_c(x) ||^2.
///
/// One probe per output value: 1 + 2C plain steps in exact arithmetic, and the graphs of C backward passes at once. For
/// many outputs take UnitJacobian with several directions instead. The output must be floating-point, [M, ...]. Neither
/// labels nor the loss are used.
///
/// ```cpp
/// auto value = microreg::JacobianNorm{}(model->forward(x), model->parameters());
/// ```
struct JacobianNorm {
  [[nodiscard]] std::string_view name() const noexcept { return "jacobian_norm"; }  ///< "jacobian_norm" in Report

  /// s_c = mean over x in M of f_c(x), c = 1 ... C. Throws ModelError unless the output is floating-point, [M, ...].
  template <detail::HasTensorOutput Pass>
  [[nodiscard]] std::vector<at::Tensor> probes(const Pass& pass) const {
    return probes_of(pass.output);
  }

  /// The penalty of `output`; see squared_gradient_norm() for what it costs and throws.
  [[nodiscard]] at::Tensor operator()(const at::Tensor& output, const std::vector<at::Tensor>& parameters) const {
    return detail::summed_squared_gradient_norms(probes_of(output), parameters, name());
  }

 private:
  [[nodiscard]] std::vector<at::Tensor> probes_of(const at::Tensor& output) const {
    return differentiable_output(output, name()).reshape({output.size(0), -1}).mean(0).unbind();
  }
};

}  // namespace microreg::inline MICROREG_ABI
