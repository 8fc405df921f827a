/// @file
/// Grafting: a step in the direction of one gradient with the norm of another.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/StringUtil.h>
#include <microreg/detail/gradients.hpp>
#include <microreg/error.hpp>

#include <cmath>
#include <vector>

namespace microreg {

/// Scales the gradients of `parameters` in place, all by one factor, so that their joint norm becomes `norm`:
///
///     grad <- norm * grad / ||grad||,   ||grad||^2 = sum over the parameters of || parameter.grad ||^2.
///
/// Call it between `backward` and `optimizer.step()`. With plain SGD the step then has the length learning rate * norm.
/// The paper (arXiv:2211.15853) takes the direction from a large batch, and the norm
/// - iteratively, from one micro-batch of the same batch: `report.penalties[0].micro_batch_norms[0]` of GradientNorm;
/// - externally, from the record of a small-batch run;
/// - or fixed ("normalized").
///
/// `norm` is a scalar tensor; no device is synchronised. Parameters without a gradient are passed over; a gradient of
/// zero stays zero. Returns the norm that was there before, a scalar. Cost: two passes over the gradients. Throws
/// ModelError if no parameter has a gradient, OptionError if `norm` is no scalar.
///
/// ```cpp
/// auto report = regularizer.backward(images, labels);  // GradientNorm with strength 0: measured, not penalised
/// microreg::graft(model->parameters(), report.penalties[0].micro_batch_norms[0]);
/// optimizer.step();
/// ```
inline at::Tensor graft(const std::vector<at::Tensor>& parameters, const at::Tensor& norm) {
  const at::NoGradGuard no_grad;
  if (!norm.defined() || norm.numel() != 1) {
    throw OptionError(c10::str("the norm to graft has ", norm.defined() ? norm.numel() : 0,
                               " values; pass one, as a number or a scalar tensor"));
  }
  std::vector<at::Tensor> gradients;
  for (const at::Tensor& parameter : parameters) {
    if (parameter.defined() && parameter.grad().defined()) {
      gradients.push_back(parameter.grad());
    }
  }
  if (gradients.empty()) {
    throw ModelError(c10::str("none of the ", parameters.size(),
                              " parameters has a gradient to graft onto; call backward() before graft()"));
  }
  at::Tensor before = detail::squared_norm(gradients, gradients.front().options()).sqrt_();
  const at::Tensor target = norm.detach().reshape({}).to(before.options());
  const at::Tensor factor = at::where(before > 0, target / before, at::zeros_like(before));
  for (at::Tensor& gradient : gradients) {
    gradient.mul_(factor.to(gradient.device()));
  }
  return before;
}

/// The same with a fixed norm. Throws OptionError if it is not a finite number, at least 0.
///
/// ```cpp
/// microreg::graft(model->parameters(), 1.0);  // the learning rate becomes the length of the step
/// ```
inline at::Tensor graft(const std::vector<at::Tensor>& parameters, double norm) {
  if (!std::isfinite(norm) || norm < 0) {
    throw OptionError(c10::str("the norm to graft is ", norm, "; it must be a finite number, at least 0"));
  }
  return graft(parameters, at::scalar_tensor(norm, at::kDouble));
}

}  // namespace microreg
