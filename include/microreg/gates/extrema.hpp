/// @file
/// max, min, median, amax, amin, aminmax over everything or over dimensions, the elementwise maximum, minimum, fmax and
/// fmin, and reductions by index. Ties share as in LibTorch's gradient.
#pragma once

#include <ATen/ATen.h>
#include <microreg/detail/libtorch.hpp>
#include <microreg/detail/tensors.hpp>
#include <microreg/gates/kinked_operation.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail::gating {

/// The mean of the elements that were extremal in the first pass; over all dimensions, if none are given.
inline at::Tensor mean_where(const at::Tensor& self, const at::Tensor& gate, at::IntArrayRef dim = {},
                             bool keepdim = false) {
  const at::Tensor taken = self.masked_fill(gate.logical_not(), 0);
  return self.dim() == 0 ? taken : taken.sum(dim, keepdim) / gate.sum(dim, keepdim);
}

/// Where self is `extreme`, which a reduction gave.
inline at::Tensor where_extreme(const at::Tensor& self, at::Tensor extreme, const std::vector<std::int64_t>& dim,
                                bool keepdim) {
  if (!keepdim && self.dim() > 0) {
    auto sizes = self.sizes().vec();
    if (dim.empty()) {
      sizes.assign(sizes.size(), 1);
    }
    for (const std::int64_t d : dim) {
      sizes[static_cast<std::size_t>(d < 0 ? d + self.dim() : d)] = 1;
    }
    extreme = extreme.view(sizes);
  }
  return self.eq(extreme);
}

inline GateTensors gates_of_all(const Arguments& in, const std::vector<c10::IValue>& results) {
  return {in.tensor(0).eq(results[0].toTensor())};
}
inline Tensors replay_all(const Arguments& in, const GateTensors& gates) {
  return {mean_where(in.tensor(0), gates[0])};
}

inline GateTensors gates_of_dimensions(const Arguments& in, const std::vector<c10::IValue>& results) {
  return {where_extreme(in.tensor(0), results[0].toTensor(), in.integers(1), in.flag(2))};
}
inline Tensors replay_dimensions(const Arguments& in, const GateTensors& gates) {
  return {mean_where(in.tensor(0), gates[0], in.integers(1), in.flag(2))};
}

inline std::vector<std::int64_t> dimension_or_all(const Arguments& in) {
  return in.given(1) ? std::vector<std::int64_t>{in.integer(1)} : std::vector<std::int64_t>{};
}

/// Where `one` is the larger, and where both are equal.
inline GateTensors gates_of_pair(const at::Tensor& one, const at::Tensor& other) {
  return {one.gt(other), one.eq(other)};
}

/// The gates of fmax and fmin, which pass over NaN.
inline GateTensors without_nan(const Arguments& in, GateTensors gates) {
  gates[0].logical_or_(in.tensor(1).isnan());
  if (!clamp_shares_ties) {
    gates[0].logical_or_(gates[1]);
    gates.pop_back();
  }
  return gates;
}

/// The first where gates[0], the mean of both where gates[1].
inline Tensors replay_pair(const Arguments& in, const GateTensors& gates) {
  const at::Tensor& self = in.tensor(0);
  const at::Tensor& other = in.tensor(1);
  return {at::where(gates[0], self, gates.size() == 1 ? other : at::where(gates[1], (self + other) / 2, other))};
}

// scatter_reduce and index_reduce: the mean of the elements that were extremal at a place.

struct Scattered {
  at::Tensor index;
  at::Tensor source;
};
/// Index and source as scatter_add takes them: one element of the index for each of the source.
inline Scattered scattered(const Arguments& in) {
  const at::Tensor& index = in.tensor(2);
  at::Tensor source = in.tensor(3);
  if (std::string_view(in.operation()).starts_with("index_reduce")) {
    std::vector<std::int64_t> sizes(static_cast<std::size_t>(source.dim()), 1);
    sizes[static_cast<std::size_t>(at::maybe_wrap_dim(in.integer(1), source.dim()))] = -1;
    return {index.view(sizes).expand_as(source), source};
  }
  for (std::int64_t d = 0; d < index.dim(); ++d) {
    source = source.narrow(d, 0, index.size(d));
  }
  return {index, source};
}

inline GateTensors gates_of_reduced_index(const Arguments& in) {
  const auto [index, source] = scattered(in);
  const std::int64_t dim = in.integer(1);
  const at::Tensor self = in.tensor(0).detach();
  const at::Tensor result = self.scatter_reduce(dim, index, source.detach(), in.text(4), in.flag(5));
  at::Tensor own = self.eq(result);
  if (!in.flag(5)) {
    own = own.logical_and_(at::ones_like(own).scatter_(dim, index, false));
  }
  return {own, source.eq(result.gather(dim, index))};
}

inline Tensors replay_reduced_index(const Arguments& in, const GateTensors& gates) {
  const auto [index, source] = scattered(in);
  const std::int64_t dim = in.integer(1);
  const at::Tensor sum =
      in.tensor(0).masked_fill(~gates[0], 0).scatter_add(dim, index, source.masked_fill(~gates[1], 0));
  return {sum / gates[0].to(at::kLong).scatter_add(dim, index, gates[1].to(at::kLong))};
}

inline bool reduces_to_extremes(const Arguments& in) { return in.text(4) == "amax" || in.text(4) == "amin"; }

inline constexpr KinkedOperation extrema[] = {
    {"max", "Tensor self", nullptr, gates_of_all, replay_all},
    {"min", "Tensor self", nullptr, gates_of_all, replay_all},
    {"median", "Tensor self", nullptr, gates_of_all, replay_all},
    {"nanmedian", "Tensor self", nullptr, gates_of_all, replay_all},
    {"amax", "Tensor self, int[] dim, bool keepdim", nullptr, gates_of_dimensions, replay_dimensions},
    {"amin", "Tensor self, int[] dim, bool keepdim", nullptr, gates_of_dimensions, replay_dimensions},
    {"aminmax", "Tensor self, int? dim, bool keepdim -> Tensor, Tensor", nullptr,
     [](const Arguments& in, const std::vector<c10::IValue>& results) {
       GateTensors gates;
       for (const c10::IValue& result : results) {
         gates.push_back(where_extreme(in.tensor(0), result.toTensor(), dimension_or_all(in), in.flag(2)));
       }
       return gates;
     },
     [](const Arguments& in, const GateTensors& gates) {
       const auto dim = dimension_or_all(in);
       return Tensors{mean_where(in.tensor(0), gates[0], dim, in.flag(2)),
                      mean_where(in.tensor(0), gates[1], dim, in.flag(2))};
     }},
    {"maximum", "Tensor self, Tensor other",
     [](const Arguments& in) { return gates_of_pair(in.tensor(0), in.tensor(1)); }, nullptr, replay_pair},
    {"minimum", "Tensor self, Tensor other",
     [](const Arguments& in) { return gates_of_pair(in.tensor(1), in.tensor(0)); }, nullptr, replay_pair},
    {"fmax", "Tensor self, Tensor other",
     [](const Arguments& in) { return without_nan(in, gates_of_pair(in.tensor(0), in.tensor(1))); }, nullptr,
     replay_pair},
    {"fmin", "Tensor self, Tensor other",
     [](const Arguments& in) { return without_nan(in, gates_of_pair(in.tensor(1), in.tensor(0))); }, nullptr,
     replay_pair},
    {"scatter_reduce.two", "Tensor self, int dim, Tensor index, Tensor src, str reduce, bool include_self",
     gates_of_reduced_index, nullptr, replay_reduced_index, reduces_to_extremes},
    {"index_reduce", "Tensor self, int dim, Tensor index, Tensor source, str reduce, bool include_self",
     gates_of_reduced_index, nullptr, replay_reduced_index, reduces_to_extremes},
};

}  // namespace microreg::inline MICROREG_ABI::detail::gating
