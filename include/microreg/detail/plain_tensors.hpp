/// @file
/// Which tensors the fused formulas are for.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>

namespace microreg::detail {

/// The element types that our formulas and kernels are for. Decided here alone: with_type() is the one way to them.
inline bool has_formulas(at::ScalarType type) { return type == at::kFloat || type == at::kDouble; }

/// body(T{}) for the C++ type T of `type`, one of those above.
template <class Body>
void with_type(at::ScalarType type, const Body& body) {
  type == at::kDouble ? body(double{}) : body(float{});
}

/// Whether a tensor is one that our formulas were written for: dense, real, of one of the types above, on the CPU or on
/// CUDA, no subclass, no forward-mode tangent.
inline bool is_plain(const at::Tensor& tensor) {
  if (!tensor.defined()) {
    return true;
  }
  using c10::DispatchKey;
  static const c10::DispatchKeySet special(
      {DispatchKey::Python, DispatchKey::Functionalize, DispatchKey::Conjugate, DispatchKey::Negative});
  return (tensor.is_cpu() || tensor.is_cuda()) && tensor.layout() == at::kStrided &&
         has_formulas(tensor.scalar_type()) && !tensor.key_set().has_any(special) && !tensor._fw_grad(0).defined();
}

/// Whether a functorch transform is at work on this thread. Its stack of them would say so too; the header that
/// declares it needs nlohmann/json, which LibTorch does not bring, and costs every user's compiler seconds.
inline bool is_transformed() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

/// Whether all of them are, of one type, and no functorch transform is at work: under one no node of ours may be
/// recorded, not even for tensors that are not wrapped.
inline bool are_plain(at::TensorList tensors) {
  at::ScalarType type = at::ScalarType::Undefined;
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.defined()) {
      continue;
    }
    if (!is_plain(tensor) || (type != at::ScalarType::Undefined && tensor.scalar_type() != type)) {
      return false;
    }
    type = tensor.scalar_type();
  }
  return !is_transformed();
}

/// Whether an intercepted backward operation should be recorded with a formula of ours for its own derivative.
inline bool should_fuse(at::TensorList tensors) {
  return at::GradMode::is_enabled() && are_plain(tensors) &&
         std::any_of(tensors.begin(), tensors.end(),
                     [](const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); });
}

}  // namespace microreg::detail
