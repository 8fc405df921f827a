/// @file
/// JacobianNorm: a penalty on the parameter Jacobian of the mean output, all rows of it.
///
/// J-bar is the Jacobian of the mean output, [C, number of parameters], row c = grad_w mean over x in M of f_c(x).
/// Outputs of more dimensions are read as one vector a sample, so C is the number of output values per sample.
#pragma once

#include <ATen/ATen.h>
#include <microreg/squared_gradient_norm.hpp>

#include <string_view>
#include <vector>

namespace microreg::inline MICROREG_ABI {

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
