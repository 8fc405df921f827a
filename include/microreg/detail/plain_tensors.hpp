/// @file
/// Which tensors the fused formulas are for.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <microreg/version.hpp>

#include <algorithm>
#include <initializer_list>

namespace microreg::inline MICROREG_ABI::detail {

/// The element types that our kernels are for. Decided here alone: with_type() is the one way to them.
inline bool has_kernels(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16;
}

inline bool is_half(at::ScalarType type) { return type == at::kHalf || type == at::kBFloat16; }

/// The type in which sums and statistics of a type are taken: half types add up in float32.
inline at::ScalarType wide_type(at::ScalarType type) { return is_half(type) ? at::kFloat : type; }

/// The same values in that type; undefined stays undefined.
inline at::Tensor widened(at::Tensor tensor) {
  return tensor.defined() && is_half(tensor.scalar_type()) ? tensor.to(at::kFloat) : tensor;
}

/// How a formula takes tensors of half types.
enum class HalfTypes {
  as_they_are,  ///< it selects and multiplies, or is made of LibTorch's operations, which do it in their own way
  widened,      ///< it sums, or cancels: in float32, also where float32 tensors stand beside (weights under autocast)
  widened_by_formula,  ///< the same, by widen_unless_read()
};

/// What kernels are to read together, each undefined or of one type: in bfloat16 as it lies, which they widen in their
/// registers; all else of half types, and all that is for other operations, in float32.
inline void widen_unless_read(bool by_kernels, std::initializer_list<at::Tensor*> tensors) {
  if (!by_kernels || !std::all_of(tensors.begin(), tensors.end(), [](const at::Tensor* tensor) {
        return !tensor->defined() || tensor->scalar_type() == at::kBFloat16;
      })) {
    for (at::Tensor* const tensor : tensors) {
      *tensor = widened(*tensor);
    }
  }
}

/// body(T{}) for the C++ type T of `type`, one of those above.
template <class Body>
void with_type(at::ScalarType type, const Body& body) {
  type == at::kDouble ? body(double{}) : type == at::kFloat ? body(float{}) : body(at::BFloat16{});
}

/// Whether a tensor is one that our formulas were written for: dense, real, on the CPU or on CUDA, no subclass, no
/// forward-mode tangent.
inline bool is_plain(const at::Tensor& tensor) {
  if (!tensor.defined()) {
    return true;
  }
  using c10::DispatchKey;
  static const c10::DispatchKeySet special(
      {DispatchKey::Python, DispatchKey::Functionalize, DispatchKey::Conjugate, DispatchKey::Negative});
  return (tensor.is_cpu() || tensor.is_cuda()) && tensor.layout() == at::kStrided &&
         has_kernels(wide_type(tensor.scalar_type())) && !tensor.key_set().has_any(special) &&
         !tensor._fw_grad(0).defined();
}

/// Whether a functorch transform is at work on this thread. Its stack of them would say so too; the header that
/// declares it needs nlohmann/json, which LibTorch does not bring, and costs every user's compiler seconds.
inline bool is_transformed() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

/// Whether all of them are, of one type, and no functorch transform is at work: under one no node of ours may be
/// recorded, not even for tensors that are not wrapped.
inline bool are_plain(at::TensorList tensors, HalfTypes halves) {
  at::ScalarType type = at::ScalarType::Undefined;
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.defined()) {
      continue;
    }
    if (!is_plain(tensor)) {
      return false;
    }
    const at::ScalarType own =
        halves == HalfTypes::as_they_are ? tensor.scalar_type() : wide_type(tensor.scalar_type());
    if (type != at::ScalarType::Undefined && own != type) {
      return false;
    }
    type = own;
  }
  return !is_transformed();
}

inline bool any_requires_grad(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); });
}

/// Whether an intercepted backward operation should be recorded with a formula of ours for its own derivative.
inline bool should_fuse(at::TensorList tensors, HalfTypes halves) {
  return at::GradMode::is_enabled() && are_plain(tensors, halves) && any_requires_grad(tensors);
}

}  // namespace microreg::inline MICROREG_ABI::detail
