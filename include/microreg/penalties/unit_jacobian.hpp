/// @file
/// UnitJacobian (UJ): a penalty on random unit combinations of the rows of the parameter Jacobian of the mean output.
///
/// J-bar is the Jacobian of the mean output, [C, number of parameters], row c = grad_w mean over x in M of f_c(x).
/// Outputs of more dimensions are read as one vector a sample, so C is the number of output values per sample.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <microreg/penalties/expectation.hpp>
#include <microreg/squared_gradient_norm.hpp>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

namespace microreg::inline MICROREG_ABI {

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

}  // namespace microreg::inline MICROREG_ABI
