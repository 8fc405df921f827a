/// @file
/// Operations that decide and have no gradient: comparisons, roundings, the choice of elements. A second pass gets what
/// they gave in the first, and with it whatever is composed of them is frozen: where(x > 0, ..), masks, margins,
/// routing.
#pragma once

#include <ATen/ATen.h>
#include <microreg/gates/history.hpp>
#include <microreg/gates/kernel.hpp>
#include <microreg/gates/schema.hpp>

#include <optional>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail::gating {

/// Their results are those of the first pass.
inline constexpr Operations decisions[] = {
    {"... -> Tensor",
     {"gt.Scalar",
      "gt.Tensor",
      "lt.Scalar",
      "lt.Tensor",
      "ge.Scalar",
      "ge.Tensor",
      "le.Scalar",
      "le.Tensor",
      "eq.Scalar",
      "eq.Tensor",
      "ne.Scalar",
      "ne.Tensor",
      "isnan",
      "isinf",
      "isposinf",
      "isneginf",
      "signbit",
      "isin.Tensor_Tensor",
      "isin.Tensor_Scalar",
      "isin.Scalar_Tensor",
      "logical_not",
      "logical_and",
      "logical_or",
      "logical_xor",
      "any",
      "any.dim",
      "any.dims",
      "all",
      "all.dim",
      "all.dims",
      "argmax",
      "argmin",
      "nonzero",
      "nonzero_static",
      "count_nonzero",
      "count_nonzero.dim_IntList",
      "bucketize.Tensor",
      "bucketize.Scalar",
      "searchsorted.Tensor",
      "searchsorted.Scalar",
      "histc"}},
    {"... -> Tensor, Tensor, Tensor", {"_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"}},
};

/// What leaves the tensors for the program. A second pass may do without, or read more.
inline constexpr Operations readings[] = {
    {"... -> bool", {"equal"}},
    {"... -> Scalar", {"_local_scalar_dense"}},
};

/// The same, but LibTorch runs them in a second pass too, for their gradient of zeros.
inline constexpr Operations steps[] = {
    {"... -> Tensor",
     {"sign", "sgn", "floor", "ceil", "round", "round.decimals", "trunc", "heaviside", "angle", "floor_divide",
      "floor_divide.Scalar"}},
    {"..., str? rounding_mode", {"div.Tensor_mode", "div.Scalar_mode"}},
};

/// Values and indices over a dimension: a second pass gets the indices of the first, and the values there.
inline constexpr Operations selections[] = {
    {"Tensor self, int dim, bool keepdim -> Tensor, Tensor",
     {"max.dim", "min.dim", "median.dim", "nanmedian.dim", "mode"}},
    {"Tensor self, int k, int dim, bool keepdim -> Tensor, Tensor", {"kthvalue"}},
    {"Tensor self, int dim, bool descending -> Tensor, Tensor", {"sort"}},
    {"Tensor self, bool? stable, int dim, bool descending -> Tensor, Tensor", {"sort.stable"}},
    {"Tensor self, int k, int dim, bool largest, bool sorted -> Tensor, Tensor", {"topk"}},
    {"Tensor self, int dim -> Tensor, Tensor", {"cummax", "cummin"}},
};

inline constexpr Operations conversions[] = {{"Tensor self, int? dtype, ...", {"_to_copy"}}};
inline constexpr Operations cuts[] = {{"Tensor self", {"detach"}}};

inline at::Tensor as_tensor(const c10::IValue& result) {
  return result.isTensor() ? result.toTensor().detach().clone() : at::scalar_tensor(result.toScalar(), at::kDouble);
}

/// The gates that the first pass recorded for a decision. If no gradient depends on its operands it may not have been
/// there: samples are drawn once, and losses are printed once.
inline std::optional<GateTensors> decided(InterceptedCall& call, bool differentiates) {
  return differentiates ? call.next() : call.session.next_if_there(call.in.operation(), call.in.sizes());
}

inline void record_results(InterceptedCall& call, bool differentiates) {
  GateTensors gates;
  {
    const StockKernels exclude;
    call.stock();
    for (const c10::IValue& result : call.results()) {
      gates.push_back(as_tensor(result));
    }
  }
  call.record(std::move(gates), /*may_be_left_out=*/!differentiates);
}

/// Without a rounding mode a division has no gates.
inline void step(InterceptedCall& call) {
  const auto mode = call.in.find("rounding_mode");
  if (mode && !call.in.given(*mode)) {
    return call.stock();
  }
  const bool differentiates = call.in.requires_grad();
  if (!call.session.replays()) {
    return record_results(call, differentiates);
  }
  const auto gates = decided(call, differentiates);
  call.stock();
  if (gates) {
    const StockKernels exclude;
    const auto results = call.results();
    for (std::size_t i = 0; i < results.size(); ++i) {
      replace_values(results[i].toTensor(), (*gates)[i]);
    }
  }
}

inline void decide(InterceptedCall& call, bool differentiates) {
  const auto reproduced = [&] {
    for (const c10::IValue& result : call.results()) {
      if (result.isTensor()) {
        call.session.reproduced(result.toTensor());
      }
    }
  };
  if (!call.session.replays()) {
    record_results(call, differentiates);
    return reproduced();
  }
  const auto gates = decided(call, differentiates);
  if (!gates) {
    return call.stock();
  }
  const StockKernels exclude;
  std::vector<c10::IValue> results;
  for (const at::Tensor& gate : *gates) {
    switch (call.returned()) {
      case c10::TypeKind::TensorType:
        results.emplace_back(gate.clone());
        break;
      case c10::TypeKind::BoolType:
        results.emplace_back(gate.item<bool>());
        break;
      default:
        results.emplace_back(gate.item());
    }
  }
  call.give(std::move(results));
  reproduced();
}

inline void decide(InterceptedCall& call) { call.in.in_place() ? step(call) : decide(call, call.in.requires_grad()); }
inline void read(InterceptedCall& call) { decide(call, /*differentiates=*/false); }

/// A conversion to integers is one, another has no gates.
inline void convert(InterceptedCall& call) {
  const c10::IValue& type = call.in.values()[1];
  if (type.isNone() || c10::isFloatingType(type.toScalarType()) || c10::isComplexType(type.toScalarType())) {
    return call.stock();
  }
  decide(call);
}

inline void select(InterceptedCall& call) {
  if (!call.session.replays()) {
    call.stock();
    return call.record({call.results()[1].toTensor()}, /*may_be_left_out=*/false);
  }
  const at::Tensor indices = call.next().front();
  call.stock();
  // The node that LibTorch made keeps these very indices for its gradient.
  const StockKernels exclude;
  const auto results = call.results();
  replace_values(results[1].toTensor(), indices);
  const at::Tensor self = call.in.tensor(0).detach();
  const std::int64_t dim = at::maybe_wrap_dim(call.in.integer(*call.in.find("dim")), self.dim());
  const auto keepdim = call.in.find("keepdim");
  const bool squeezed = keepdim && !call.in.flag(*keepdim) && self.dim() > 0;
  const at::Tensor values = self.gather(dim, squeezed ? indices.unsqueeze(dim) : indices);
  replace_values(results[0].toTensor(), squeezed ? values.squeeze(dim) : values);
}

/// What is cut from the graph is a constant to double backward: it keeps the first pass's values.
inline void hold(InterceptedCall& call) {
  if (!call.in.tensor(0).requires_grad()) {
    return call.stock();
  }
  if (!call.session.replays()) {
    return record_results(call, /*differentiates=*/false);
  }
  // Before all else a step may take inputs out of their graph to displace them.
  const auto gates = decided(call, /*differentiates=*/!call.session.at_beginning());
  if (!gates) {
    return call.stock();
  }
  const StockKernels exclude;
  if (call.in.in_place()) {
    call.stock();
    return replace_values(call.in.tensor(0), gates->front());
  }
  call.give({gates->front().clone()});
}

}  // namespace microreg::inline MICROREG_ABI::detail::gating
