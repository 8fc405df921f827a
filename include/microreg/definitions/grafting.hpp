/// @file
/// Definitions of grafting.hpp.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/finite.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/grafting.hpp>
#include <microreg/step/tensor_lists.hpp>

#include <unordered_set>
#include <vector>

namespace microreg::inline MICROREG_ABI {

namespace detail {

/// Scales the gradients to the norm that `target` makes of the one before, a scalar on the device.
template <class Target>
at::Tensor scale_gradients(const std::vector<at::Tensor>& parameters, const Target& target) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> gradients;
  std::unordered_set<const c10::TensorImpl*> seen;  // a parameter may stand in two modules
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const at::Tensor& parameter = parameters[i];
    if (!parameter.defined() || !parameter.grad().defined() || !seen.insert(parameter.unsafeGetTensorImpl()).second) {
      continue;
    }
    if (const char* const problem = problem_of_grad(parameter)) {
      throw ModelError(text({".grad of parameters[", i, "] of shape ", parameter.sizes(), " is ", problem,
                             ", so it cannot be scaled; make it dense, or clone() it"}));
    }
    gradients.push_back(parameter.grad());
  }
  if (gradients.empty()) {
    throw ModelError(text({"none of the ", parameters.size(),
                           " parameters has a gradient to graft onto; call backward() before graft()"}));
  }
  at::Tensor before = squared_norm(gradients, gradients.front().options()).sqrt_();
  // Of a norm that is NaN, so that nothing looks right that is not.
  const at::Tensor factor = at::where(before == 0, at::zeros_like(before), target(before) / before);
  for (at::Tensor& gradient : gradients) {
    gradient.mul_(factor.to(gradient.device()));
  }
  return before;
}

}  // namespace detail

MICROREG_INLINE at::Tensor graft(const std::vector<at::Tensor>& parameters, const at::Tensor& norm) {
  if (!norm.defined() || norm.numel() != 1) {
    throw OptionError(detail::text({"the norm to graft has ", norm.defined() ? norm.numel() : 0,
                                    " values; pass one, as a number or a scalar tensor"}));
  }
  return detail::scale_gradients(
      parameters, [&](const at::Tensor& before) { return norm.detach().reshape({}).to(before.options()); });
}

MICROREG_INLINE at::Tensor graft(const std::vector<at::Tensor>& parameters, double norm) {
  if (!detail::is_finite(norm) || norm < 0) {
    throw OptionError(detail::text({"the norm to graft is ", norm, "; it must be a finite number, at least 0"}));
  }
  // Made on the device: a scalar of the host's would have to be copied there, and waited for.
  return detail::scale_gradients(parameters,
                                 [&](const at::Tensor& before) { return at::full({}, norm, before.options()); });
}

}  // namespace microreg::inline MICROREG_ABI
