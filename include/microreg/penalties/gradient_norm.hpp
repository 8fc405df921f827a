/// @file
/// GradientNorm (GN): the squared norm of the micro-batch loss gradient.
#pragma once

#include <microreg/version.hpp>

#include <microreg/squared_gradient_norm.hpp>

#include <string_view>
#include <vector>

namespace microreg::inline MICROREG_ABI {

/// The squared norm of the gradient of the micro-batch mean loss,
///
///     R_M(w) = || grad_w L_M(w) ||^2,   L_M(w) = mean over (x, y) in M of loss(f_w(x), y),
///
/// with the true labels (arXiv:2211.15853, equation 3). The sum is over all selected parameters jointly.
///
/// Cost in `Regularizer`: 3.0 plain steps in exact arithmetic; the loss gradient comes for free. Any output and any
/// loss that LibTorch can differentiate twice. Same scale as the authors' code.
///
/// ```cpp
/// auto loss = criterion(model->forward(x), y);
/// auto penalty = microreg::GradientNorm{}(loss, model->parameters());
/// (loss + 0.01 * penalty).backward();
/// ```
struct GradientNorm {
  [[nodiscard]] std::string_view name() const noexcept { return "gradient_norm"; }  ///< "gradient_norm" in Report

  /// s_M = L_M, the loss of the pass itself, whose gradient is needed anyway.
  template <class Pass>
  [[nodiscard]] at::Tensor probe(const Pass& pass) const {
    return pass.loss;
  }

  /// The penalty of `loss`, a scalar with a graph. See squared_gradient_norm() for what it costs and throws.
  [[nodiscard]] at::Tensor operator()(const at::Tensor& loss, const std::vector<at::Tensor>& parameters) const {
    return squared_gradient_norm(loss, parameters, name());
  }
};

}  // namespace microreg::inline MICROREG_ABI
