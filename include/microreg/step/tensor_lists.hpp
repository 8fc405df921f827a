/// @file
/// Lists of tensors, one a parameter, of which some may be undefined: gradients, and what the step does with them.
#pragma once

#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/grad_mode.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/plain_tensors.hpp>

#include <algorithm>
#include <iterator>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// The defined ones among `tensors`.
inline std::vector<at::Tensor> defined(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> result;
  result.reserve(tensors.size());
  std::copy_if(tensors.begin(), tensors.end(), std::back_inserter(result),
               [](const at::Tensor& tensor) { return tensor.defined(); });
  return result;
}

/// The same tensors without their graph.
inline std::vector<at::Tensor> detached(std::vector<at::Tensor> tensors) {
  for (at::Tensor& tensor : tensors) {
    tensor = tensor.defined() ? tensor.detach() : tensor;
  }
  return tensors;
}

/// || tensors ||^2 over all of them jointly, without a graph, a scalar on the device; half types add up in float32, and
/// all of them in float64 if one is.
inline at::Tensor squared_norm(const std::vector<at::Tensor>& tensors, const at::TensorOptions& scalar_options) {
  const at::NoGradGuard no_grad;
  const std::vector<at::Tensor> terms = defined(tensors);
  at::ScalarType type = wide_type(c10::typeMetaToScalarType(scalar_options.dtype()));
  for (const at::Tensor& term : terms) {
    type = term.scalar_type() == at::kDouble ? at::kDouble : type;
  }
  if (terms.empty()) {
    return at::zeros({}, scalar_options.dtype(type).requires_grad(false));
  }
  std::vector<at::Tensor> norms = at::_foreach_norm(terms, 2, type);
  for (at::Tensor& norm : norms) {
    if (norm.device() != norms.front().device() || norm.scalar_type() != type) {
      norm = norm.to(norms.front().device(), type);
    }
  }
  const at::Tensor all = at::stack(norms);
  return all.is_meta() ? all.square().sum() : all.dot(all);  // which the meta device does not have
}

/// Its root in float64, as a number: reading it waits for a device.
inline double norm_of(const std::vector<at::Tensor>& tensors) {
  return squared_norm(tensors, at::TensorOptions().dtype(at::kDouble)).sqrt().item<double>();
}

/// Why nothing can be added to the `.grad` of a parameter, or scaled in it; null where it can, or there is none.
inline const char* problem_of_grad(const at::Tensor& parameter) {
  const at::Tensor grad = parameter.grad();
  if (!grad.defined()) {
    return nullptr;
  }
  return grad.layout() != at::kStrided                   ? "sparse"
         : grad.is_inference()                           ? "an inference tensor"
         : grad.sizes() != parameter.sizes()             ? "of another shape than the parameter"
         : grad.scalar_type() != parameter.scalar_type() ? "of another type than the parameter"
         : grad.device() != parameter.device()           ? "on another device than the parameter"
         : !grad.is_non_overlapping_and_dense() && at::has_internal_overlap(grad) != at::MemOverlap::No
             ? "expanded, several elements in one place"
             : nullptr;
}

/// A tensor that may be written to without changing another: `gradient` itself if nothing else refers to it.
inline at::Tensor owned(at::Tensor gradient) {
  const at::Tensor plain = gradient.detach();
  gradient.reset();
  const bool exclusive = plain.layout() == at::kStrided && plain.storage().use_count() == 1 &&
                         plain.is_non_overlapping_and_dense() && plain.storage_offset() == 0;
  return exclusive ? plain : plain.clone();
}

/// A factor on tensors: a number, or a scalar on any device, which nobody reads.
class Factor {
 public:
  Factor(double number) : number_(number) {}  // NOLINT(google-explicit-constructor): a number
  Factor(at::Tensor scalar) : number_(0), scalar_(std::move(scalar)) {}  // NOLINT(google-explicit-constructor)

  [[nodiscard]] bool is_number() const { return !scalar_.defined(); }
  [[nodiscard]] double number() const { return number_; }
  /// The scalar, where and of the type that `tensor` is.
  [[nodiscard]] at::Tensor beside(const at::Tensor& tensor) const {
    return scalar_.to(tensor.device(), tensor.scalar_type());
  }
  [[nodiscard]] at::Tensor times(const at::Tensor& tensor) const {
    return is_number() ? tensor * number_ : tensor * beside(tensor);
  }
  [[nodiscard]] Factor times(double number) const {
    return is_number() ? Factor(number_ * number) : Factor(scalar_ * number);
  }
  /// It, in a tensor of its own in the shape of `tensor`.
  [[nodiscard]] at::Tensor like(const at::Tensor& tensor) const {
    return is_number() ? at::full_like(tensor, number_) : beside(tensor).expand_as(tensor).clone();
  }

 private:
  double number_;
  at::Tensor scalar_;  // in place of the number, if defined
};

/// sums[i] += factor * terms[i], where either may be undefined (zero). Writes only to tensors in `sums`, which are of
/// float32 where the terms are of a half type: that loses small terms, and stops growing after a few hundred.
inline void add_scaled(std::vector<at::Tensor>& sums, std::vector<at::Tensor> terms, const Factor& factor = 1.0) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> into;
  std::vector<at::Tensor> from;
  for (std::size_t i = 0; i < sums.size(); ++i) {
    if (!terms[i].defined()) {
      continue;
    }
    terms[i] = widened(std::move(terms[i]));
    if (!factor.is_number()) {
      const at::Tensor scalar = factor.beside(terms[i]);
      sums[i] = sums[i].defined() ? sums[i].addcmul_(terms[i], scalar) : owned(std::move(terms[i])).mul_(scalar);
    } else if (!sums[i].defined()) {
      sums[i] = factor.number() == 1.0 ? owned(std::move(terms[i])) : factor.times(terms[i]);
    } else {
      into.push_back(sums[i]);
      from.push_back(std::move(terms[i]));
    }
  }
  if (!into.empty()) {
    at::_foreach_add_(into, from, factor.number());
  }
}

/// Gradients by all parameters, and what they count in a sum.
struct WeightedGradients {
  std::vector<at::Tensor> tensors;
  Factor weight = 1.0;
};

/// Adds all of them to `sums`, one after the other.
inline void add_scaled(std::vector<at::Tensor>& sums, std::vector<WeightedGradients> terms) {
  for (WeightedGradients& term : terms) {
    add_scaled(sums, std::move(term.tensors), term.weight);
  }
}

/// scalar / sqrt(squared), or 0 where that is 0.
inline at::Tensor over_norm(const at::Tensor& squared, double scalar) {
  return at::where(squared == 0, at::zeros_like(squared), scalar * squared.rsqrt());
}

/// Whether there are some, and all of one type on one device.
inline bool alike(const std::vector<at::Tensor>& tensors) {
  return !tensors.empty() && std::all_of(tensors.begin(), tensors.end(), [&](const at::Tensor& tensor) {
    return tensor.scalar_type() == tensors.front().scalar_type() && tensor.device() == tensors.front().device();
  });
}

/// tensors[i] * factor.
inline std::vector<at::Tensor> scaled(const std::vector<at::Tensor>& tensors, const Factor& factor) {
  if (factor.is_number()) {
    return at::_foreach_mul(tensors, factor.number());
  }
  if (alike(tensors)) {
    return at::_foreach_mul(tensors, factor.beside(tensors.front()));
  }
  std::vector<at::Tensor> result;
  result.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    result.push_back(factor.times(tensor));
  }
  return result;
}

/// The values of `tensors` times `factor`, without their graph: in the memory of those that nobody else holds, whose
/// own values are then without meaning.
inline std::vector<at::Tensor> taken_and_scaled(std::vector<at::Tensor>& tensors, const Factor& factor) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> result;
  std::vector<at::Tensor> ours;
  result.reserve(tensors.size());
  for (at::Tensor& tensor : tensors) {
    // A view that nobody else knows the base of: the gradient of a linear layer's weight is a transpose.
    const std::size_t holders = tensor.is_view() && tensor._base().use_count() == 1 ? 2 : 1;
    const bool alone = tensor.use_count() == 1 && tensor.has_storage() && tensor.storage().use_count() == holders &&
                       tensor.is_non_overlapping_and_dense();
    result.push_back(alone ? tensor.detach() : factor.times(tensor));
    if (alone) {
      ours.push_back(result.back());
    }
  }
  if (!factor.is_number() && alike(ours)) {
    at::_foreach_mul_(ours, factor.beside(ours.front()));
  } else if (!factor.is_number()) {
    for (at::Tensor& tensor : ours) {
      tensor.mul_(factor.beside(tensor));
    }
  } else if (!ours.empty() && factor.number() != 1) {
    at::_foreach_mul_(ours, factor.number());
  }
  return result;
}

/// a[i] - b[i], where undefined is zero.
inline std::vector<at::Tensor> differences(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> result;
  for (std::size_t i = 0; i < a.size(); ++i) {
    result.push_back(a[i].defined() && b[i].defined() ? a[i] - b[i] : a[i].defined() ? a[i] : b[i]);
  }
  return result;
}

inline bool at_least_float32(const std::vector<at::Tensor>& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const at::Tensor& tensor) {
    return tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble;
  });
}

/// from[i] + factor * (to[i] - from[i]), where undefined is zero and `factor` is a scalar tensor on any device.
inline std::vector<at::Tensor> extrapolated(const std::vector<at::Tensor>& from, std::vector<at::Tensor> to,
                                            const at::Tensor& factor) {
  const at::NoGradGuard no_grad;
  for (std::size_t i = 0; i < to.size(); ++i) {
    if (!from[i].defined() && !to[i].defined()) {
      continue;
    }
    const at::Tensor start = from[i].defined() ? from[i] : at::zeros_like(to[i]);
    to[i] = to[i].defined() ? owned(std::move(to[i])) : at::zeros_like(start);
    at::lerp_out(to[i], start, to[i], factor.to(start.device(), start.scalar_type()));
  }
  return to;
}

}  // namespace microreg::inline MICROREG_ABI::detail
