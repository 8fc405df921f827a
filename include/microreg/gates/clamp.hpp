/// @file
/// clamp, clamp_min, clamp_max with numbers and tensors as bounds, and abs. A value at a bound passes, as in LibTorch's
/// gradient.
#pragma once

#include <ATen/ATen.h>
#include <microreg/gates/kernel.hpp>

#include <cmath>
#include <limits>
#include <optional>

namespace microreg::detail {

using MaybeScalar = std::optional<at::Scalar>;
using MaybeTensor = std::optional<at::Tensor>;

// Bounds that are numbers.

/// The next number beyond a bound, in the type that kernels compare in: strictly between these is between the bounds
/// or at one.
inline at::Scalar beyond(const at::Scalar& bound, double towards, at::ScalarType type) {
  if (type == at::kDouble) {
    return std::nextafter(bound.toDouble(), towards);
  }
  return std::nextafter(bound.toFloat(), static_cast<float>(towards));
}

inline at::Tensor replay_clamp(const at::Tensor& self, const at::Tensor& first, const MaybeScalar& min,
                               const MaybeScalar& max) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  return replay_between(self, first, at::clamp(first, min, max),
                        beyond(min.value_or(-infinity), -infinity, self.scalar_type()),
                        beyond(max.value_or(infinity), infinity, self.scalar_type()));
}

inline at::Tensor clamp_kernel(const at::Tensor& self, const MaybeScalar& min, const MaybeScalar& max) {
  return gated(
      "clamp", {&self}, [&] { return at::clamp(self, min, max); }, [&] { return Gates{value_gate(self)}; },
      [&](const Gates& gates) { return replay_clamp(self, gates[0], min, max); });
}

inline at::Tensor& clamp_in_place_kernel(at::Tensor& self, const MaybeScalar& min, const MaybeScalar& max) {
  return gated(
      "clamp_", {&self}, [&]() -> at::Tensor& { return at::clamp_(self, min, max); },
      [&] { return Gates{overwritten_gate(self)}; },
      [&](const Gates& gates) -> at::Tensor& { return overwrite(self, replay_clamp(self, gates[0], min, max)); });
}

inline at::Tensor clamp_min_kernel(const at::Tensor& self, const at::Scalar& min) {
  return gated(
      "clamp_min", {&self}, [&] { return at::clamp_min(self, min); }, [&] { return Gates{value_gate(self)}; },
      [&](const Gates& gates) { return replay_clamp(self, gates[0], min, std::nullopt); });
}

inline at::Tensor& clamp_min_in_place_kernel(at::Tensor& self, const at::Scalar& min) {
  return gated(
      "clamp_min_", {&self}, [&]() -> at::Tensor& { return at::clamp_min_(self, min); },
      [&] { return Gates{overwritten_gate(self)}; },
      [&](const Gates& gates) -> at::Tensor& {
        return overwrite(self, replay_clamp(self, gates[0], min, std::nullopt));
      });
}

inline at::Tensor clamp_max_kernel(const at::Tensor& self, const at::Scalar& max) {
  return gated(
      "clamp_max", {&self}, [&] { return at::clamp_max(self, max); }, [&] { return Gates{value_gate(self)}; },
      [&](const Gates& gates) { return replay_clamp(self, gates[0], std::nullopt, max); });
}

inline at::Tensor& clamp_max_in_place_kernel(at::Tensor& self, const at::Scalar& max) {
  return gated(
      "clamp_max_", {&self}, [&]() -> at::Tensor& { return at::clamp_max_(self, max); },
      [&] { return Gates{overwritten_gate(self)}; },
      [&](const Gates& gates) -> at::Tensor& {
        return overwrite(self, replay_clamp(self, gates[0], std::nullopt, max));
      });
}

// Bounds that are tensors, and may be differentiated.

inline Gates clamp_tensor_gates(const at::Tensor& self, const MaybeTensor& min, const MaybeTensor& max) {
  Gates gates;
  if (min.has_value()) {
    gates.push_back(self.lt(*min));
  }
  if (max.has_value()) {
    gates.push_back(min.has_value() ? self.gt(*max).logical_or(max->lt(*min)) : self.gt(*max));
  }
  if (min.has_value() && max.has_value()) {
    // Between equal bounds LibTorch gives neither a gradient from below.
    gates.push_back(min->eq(*max));
  }
  return gates;
}

inline at::Tensor replay_clamp_tensor(const at::Tensor& self, const Gates& gates, const MaybeTensor& min,
                                      const MaybeTensor& max) {
  at::Tensor result = self;
  if (min.has_value()) {
    const at::Tensor low = max.has_value() ? at::where(gates[2], min->detach(), *min) : *min;
    result = at::where(gates[0], low, result);
  }
  if (max.has_value()) {
    result = at::where(min.has_value() ? gates[1] : gates[0], *max, result);
  }
  return result;
}

inline const at::Tensor& defined_or(const MaybeTensor& tensor, const at::Tensor& otherwise) {
  return tensor.has_value() ? *tensor : otherwise;
}

inline at::Tensor clamp_tensor_kernel(const at::Tensor& self, const MaybeTensor& min, const MaybeTensor& max) {
  return gated(
      "clamp", {&self, &defined_or(min, self), &defined_or(max, self)}, [&] { return at::clamp(self, min, max); },
      [&] { return clamp_tensor_gates(self, min, max); },
      [&](const Gates& gates) { return replay_clamp_tensor(self, gates, min, max); });
}

inline at::Tensor& clamp_tensor_in_place_kernel(at::Tensor& self, const MaybeTensor& min, const MaybeTensor& max) {
  return gated(
      "clamp_", {&self, &defined_or(min, self), &defined_or(max, self)},
      [&]() -> at::Tensor& { return at::clamp_(self, min, max); }, [&] { return clamp_tensor_gates(self, min, max); },
      [&](const Gates& gates) -> at::Tensor& { return overwrite(self, replay_clamp_tensor(self, gates, min, max)); });
}

inline at::Tensor clamp_min_tensor_kernel(const at::Tensor& self, const at::Tensor& min) {
  return gated(
      "clamp_min", {&self, &min}, [&] { return at::clamp_min(self, min); }, [&] { return Gates{self.lt(min)}; },
      [&](const Gates& gates) { return at::where(gates[0], min, self); });
}

inline at::Tensor& clamp_min_tensor_in_place_kernel(at::Tensor& self, const at::Tensor& min) {
  return gated(
      "clamp_min_", {&self, &min}, [&]() -> at::Tensor& { return at::clamp_min_(self, min); },
      [&] { return Gates{self.lt(min)}; },
      [&](const Gates& gates) -> at::Tensor& { return overwrite(self, at::where(gates[0], min, self)); });
}

inline at::Tensor clamp_max_tensor_kernel(const at::Tensor& self, const at::Tensor& max) {
  return gated(
      "clamp_max", {&self, &max}, [&] { return at::clamp_max(self, max); }, [&] { return Gates{self.gt(max)}; },
      [&](const Gates& gates) { return at::where(gates[0], max, self); });
}

inline at::Tensor& clamp_max_tensor_in_place_kernel(at::Tensor& self, const at::Tensor& max) {
  return gated(
      "clamp_max_", {&self, &max}, [&]() -> at::Tensor& { return at::clamp_max_(self, max); },
      [&] { return Gates{self.gt(max)}; },
      [&](const Gates& gates) -> at::Tensor& { return overwrite(self, at::where(gates[0], max, self)); });
}

// abs: the sign of the first input times the second.

inline Gates sign_gate(const at::Tensor& self) { return {self.sign().to(at::kChar)}; }

inline at::Tensor abs_kernel(const at::Tensor& self) {
  return gated(
      "abs", {&self}, [&] { return at::abs(self); }, [&] { return sign_gate(self); },
      [&](const Gates& gates) { return self * gates[0].to(self.scalar_type()); });
}

inline at::Tensor& abs_in_place_kernel(at::Tensor& self) {
  return gated(
      "abs_", {&self}, [&]() -> at::Tensor& { return at::abs_(self); }, [&] { return sign_gate(self); },
      [&](const Gates& gates) -> at::Tensor& { return self.mul_(gates[0].to(self.scalar_type())); });
}

}  // namespace microreg::detail
