/// @file
/// AverageJacobian (AJ) and UnitJacobian (UJ): penalties on the parameter Jacobian of the model's output.
///
/// J-bar is the Jacobian of the mean output, [C, number of parameters], row c = grad_w mean over x in M of f_c(x).
/// Outputs of more dimensions are read as one vector a sample, so C is the number of output values per sample.
#pragma once

#include <ATen/core/grad_mode.h>
#include <microreg/squared_gradient_norm.hpp>

#include <concepts>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

namespace microreg {

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
  [[nodiscard]] std::string_view name() const noexcept { return "average_jacobian"; }

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
/// squared Frobenius norm of J-bar divided by C. The output must be floating-point, [M, ...]; u comes from
/// `Regularizer`'s generator, otherwise from the default one of the output's device. Cost in `Regularizer`: 3.0 plain
/// steps in exact arithmetic. Neither labels nor the loss are used.
///
/// ```cpp
/// auto value = microreg::UnitJacobian{}(model->forward(x), model->parameters());
/// ```
struct UnitJacobian {
  [[nodiscard]] std::string_view name() const noexcept { return "unit_jacobian"; }

  template <detail::HasTensorOutput Pass>
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
    const at::Tensor mean = differentiable_output(output, name()).reshape({output.size(0), -1}).mean(0);
    return mean.dot(direction(mean, generator));
  }

  /// Uniform on the unit sphere: a standard normal vector, divided by its norm.
  static at::Tensor direction(const at::Tensor& like, const std::optional<at::Generator>& generator) {
    const at::NoGradGuard no_grad;
    const at::Tensor normal = at::empty_like(like).normal_(0, 1, generator);
    return normal / normal.norm();
  }
};

}  // namespace microreg
