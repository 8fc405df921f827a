/// @file
/// max, min, amax, amin and the elementwise maximum, minimum, fmax, fmin. Ties share as in LibTorch's gradient.
#pragma once

#include <ATen/ATen.h>
#include <microreg/gates/kernel.hpp>

#include <cstdint>
#include <tuple>

namespace microreg::detail {

// Over all elements, and over dimensions: the mean of the elements that were extremal in the first pass.

inline at::Tensor mean_where(const at::Tensor& self, const at::Tensor& gate) {
  return self.masked_fill(gate.logical_not(), 0).sum() / gate.sum();
}

inline at::Tensor mean_where(const at::Tensor& self, const at::Tensor& gate, at::IntArrayRef dim, bool keepdim) {
  if (self.dim() == 0) {
    return self.masked_fill(gate.logical_not(), 0);
  }
  return self.masked_fill(gate.logical_not(), 0).sum(dim, keepdim) / gate.sum(dim, keepdim);
}

inline at::Tensor max_kernel(const at::Tensor& self) {
  return gated(
      "max", {&self}, [&] { return at::max(self); }, [&](const at::Tensor& result) { return Gates{self.eq(result)}; },
      [&](const Gates& gates) { return mean_where(self, gates[0]); });
}

inline at::Tensor min_kernel(const at::Tensor& self) {
  return gated(
      "min", {&self}, [&] { return at::min(self); }, [&](const at::Tensor& result) { return Gates{self.eq(result)}; },
      [&](const Gates& gates) { return mean_where(self, gates[0]); });
}

/// The result of a reduction over dimensions with its dimensions back, to compare it with the operand.
inline at::Tensor with_reduced_dimensions(at::Tensor result, const at::Tensor& self, at::IntArrayRef dim,
                                          bool keepdim) {
  if (keepdim || self.dim() == 0) {
    return result;
  }
  auto sizes = self.sizes().vec();
  if (dim.empty()) {
    sizes.assign(sizes.size(), 1);
  }
  for (const std::int64_t d : dim) {
    sizes[static_cast<std::size_t>(d < 0 ? d + self.dim() : d)] = 1;
  }
  return result.view(sizes);
}

inline at::Tensor amax_kernel(const at::Tensor& self, at::IntArrayRef dim, bool keepdim) {
  return gated(
      "amax", {&self}, [&] { return at::amax(self, dim, keepdim); },
      [&](const at::Tensor& result) { return Gates{self.eq(with_reduced_dimensions(result, self, dim, keepdim))}; },
      [&](const Gates& gates) { return mean_where(self, gates[0], dim, keepdim); });
}

inline at::Tensor amin_kernel(const at::Tensor& self, at::IntArrayRef dim, bool keepdim) {
  return gated(
      "amin", {&self}, [&] { return at::amin(self, dim, keepdim); },
      [&](const at::Tensor& result) { return Gates{self.eq(with_reduced_dimensions(result, self, dim, keepdim))}; },
      [&](const Gates& gates) { return mean_where(self, gates[0], dim, keepdim); });
}

// Over one dimension, with indices: the elements there.

using TwoTensors = std::tuple<at::Tensor, at::Tensor>;

inline TwoTensors replay_indices(const at::Tensor& self, const at::Tensor& indices, std::int64_t dim, bool keepdim) {
  if (keepdim || self.dim() == 0) {
    return {self.gather(dim, indices), indices};
  }
  return {self.gather(dim, indices.unsqueeze(dim)).squeeze(dim), indices};
}

inline TwoTensors max_dim_kernel(const at::Tensor& self, std::int64_t dim, bool keepdim) {
  return gated(
      "max", {&self}, [&] { return at::max(self, dim, keepdim); },
      [](const TwoTensors& result) { return Gates{std::get<1>(result)}; },
      [&](const Gates& gates) { return replay_indices(self, gates[0], at::maybe_wrap_dim(dim, self.dim()), keepdim); });
}

inline TwoTensors min_dim_kernel(const at::Tensor& self, std::int64_t dim, bool keepdim) {
  return gated(
      "min", {&self}, [&] { return at::min(self, dim, keepdim); },
      [](const TwoTensors& result) { return Gates{std::get<1>(result)}; },
      [&](const Gates& gates) { return replay_indices(self, gates[0], at::maybe_wrap_dim(dim, self.dim()), keepdim); });
}

// Elementwise: one operand, the other, or the mean of both.

inline at::Tensor replay_pair(const at::Tensor& self, const at::Tensor& other, const Gates& gates) {
  return at::where(gates[0], self, at::where(gates[1], (self + other) / 2, other));
}

inline at::Tensor maximum_kernel(const at::Tensor& self, const at::Tensor& other) {
  return gated(
      "maximum", {&self, &other}, [&] { return at::maximum(self, other); },
      [&] { return Gates{self.gt(other), self.eq(other)}; },
      [&](const Gates& gates) { return replay_pair(self, other, gates); });
}

inline at::Tensor minimum_kernel(const at::Tensor& self, const at::Tensor& other) {
  return gated(
      "minimum", {&self, &other}, [&] { return at::minimum(self, other); },
      [&] { return Gates{self.lt(other), self.eq(other)}; },
      [&](const Gates& gates) { return replay_pair(self, other, gates); });
}

inline at::Tensor fmax_kernel(const at::Tensor& self, const at::Tensor& other) {
  return gated(
      "fmax", {&self, &other}, [&] { return at::fmax(self, other); },
      [&] { return Gates{self.ge(other).logical_or(other.isnan())}; },
      [&](const Gates& gates) { return at::where(gates[0], self, other); });
}

inline at::Tensor fmin_kernel(const at::Tensor& self, const at::Tensor& other) {
  return gated(
      "fmin", {&self, &other}, [&] { return at::fmin(self, other); },
      [&] { return Gates{self.le(other).logical_or(other.isnan())}; },
      [&](const Gates& gates) { return at::where(gates[0], self, other); });
}

}  // namespace microreg::detail
