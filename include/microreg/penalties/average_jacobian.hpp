/// @file
/// AverageJacobian (AJ): a penalty on the sum of the rows of the parameter Jacobian of the mean output.
///
/// J-bar is the Jacobian of the mean output, [C, number of parameters], row c = grad_w mean over x in M of f_c(x).
/// Outputs of more dimensions are read as one vector a sample, so C is the number of output values per sample.
#pragma once

#include <ATen/ATen.h>
#include <microreg/squared_gradient_norm.hpp>

#include <string_view>
#include <vector>

namespace microreg::inline MICROREG_ABI {

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
    const at::Tensor sum = differentiable_output(output, name()).sum();  // which refuses what has no samples
    return sum / output.size(0);
  }
};

}  // namespace microreg::inline MICROREG_ABI
