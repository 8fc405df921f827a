/// @file
/// clamp, clamp_min, clamp_max with numbers and tensors as bounds, with LibTorch's derivatives at the bounds.
#pragma once

#include <ATen/ATen.h>
#include <microreg/detail/finite.hpp>
#include <microreg/detail/libtorch.hpp>
#include <microreg/detail/tensors.hpp>
#include <microreg/gates/activations.hpp>
#include <microreg/gates/extrema.hpp>
#include <microreg/gates/kinked_operation.hpp>

#include <cstddef>
#include <cstdint>
#include <optional>

namespace microreg::inline MICROREG_ABI::detail::gating {

/// The next number beyond a bound, in the type that kernels compare in: strictly between these is between the bounds
/// or at one.
inline at::Scalar beyond(double bound, bool above, at::ScalarType type) {
  return type == at::kDouble ? at::Scalar(next_to<double, std::uint64_t>(bound, above))
                             : at::Scalar(next_to<float, std::uint32_t>(static_cast<float>(bound), above));
}

/// `passes`: so does a value at a bound.
inline Tensors replay_clamp(const at::Tensor& self, const at::Tensor& first, const std::optional<double>& min,
                            const std::optional<double>& max, bool passes = !clamp_shares_ties) {
  const auto edge = [&](const std::optional<double>& bound, bool above) {
    return !bound.has_value() ? at::Scalar(above ? unbounded() : -unbounded())
           : passes           ? beyond(*bound, above, self.scalar_type())
                              : at::Scalar(*bound);
  };
  return {replay_between(self, first, at::clamp(first, min, max), edge(min, false), edge(max, true))};
}

// Bounds that are tensors may be differentiated.

inline GateTensors clamp_tensor_gates(const Arguments& in) {
  const at::Tensor& self = in.tensor(0);
  if constexpr (clamp_shares_ties) {
    GateTensors gates;
    for (const std::size_t bound : {1U, 2U}) {
      if (in.given(bound)) {
        gates.push_back(bound == 1 ? self.lt(in.tensor(1)) : self.gt(in.tensor(2)));
        gates.push_back(self.eq(in.tensor(bound)));
      }
    }
    if (gates.size() == 4) {  // crossed bounds give the upper one, equal ones share nothing
      gates[2] = gates[2].logical_or(in.tensor(2).lt(in.tensor(1)));
      const at::Tensor apart = in.tensor(1).lt(in.tensor(2));
      gates[1] = gates[1].logical_and(apart);
      gates[3] = gates[3].logical_and(apart);
    }
    return gates;
  }
  GateTensors gates;
  if (in.given(1)) {
    gates.push_back(self.lt(in.tensor(1)));
  }
  if (in.given(2)) {
    gates.push_back(in.given(1) ? self.gt(in.tensor(2)).logical_or(in.tensor(2).lt(in.tensor(1)))
                                : self.gt(in.tensor(2)));
  }
  if (in.given(1) && in.given(2)) {
    // Between equal bounds LibTorch gives neither a gradient from below.
    gates.push_back(in.tensor(1).eq(in.tensor(2)));
  }
  return gates;
}

inline Tensors replay_clamp_tensor(const Arguments& in, const GateTensors& gates) {
  at::Tensor result = in.tensor(0);
  if constexpr (clamp_shares_ties) {
    std::size_t next = 0;
    for (const std::size_t bound : {1U, 2U}) {
      if (in.given(bound)) {
        const at::Tensor shared = (in.tensor(0) + in.tensor(bound)) / 2;
        result = at::where(gates[next], in.tensor(bound), at::where(gates[next + 1], shared, result));
        next += 2;
      }
    }
    return {result};
  }
  if (in.given(1)) {
    const at::Tensor& min = in.tensor(1);
    result = at::where(gates[0], in.given(2) ? at::where(gates[2], min.detach(), min) : min, result);
  }
  if (in.given(2)) {
    result = at::where(in.given(1) ? gates[1] : gates[0], in.tensor(2), result);
  }
  return {result};
}

inline GateTensors lower_bound_gates(const Arguments& in) {
  return clamp_shares_ties ? gates_of_pair(in.tensor(0), in.tensor(1))
                           : GateTensors{in.tensor(0).lt(in.tensor(1)).logical_not_()};
}
inline GateTensors upper_bound_gates(const Arguments& in) {
  return clamp_shares_ties ? gates_of_pair(in.tensor(1), in.tensor(0))
                           : GateTensors{in.tensor(0).gt(in.tensor(1)).logical_not_()};
}

inline constexpr KinkedOperation clamps[] = {
    {"clamp", "Tensor self, Scalar? min, Scalar? max", values, nullptr,
     [](const Arguments& in, const GateTensors& gates) {
       return replay_clamp(in.tensor(0), gates[0], in.maybe_number(1), in.maybe_number(2));
     }},
    {"clamp_min", "Tensor self, Scalar min", values, nullptr,
     [](const Arguments& in, const GateTensors& gates) {
       return replay_clamp(in.tensor(0), gates[0], in.number(1), std::nullopt);
     }},
    {"clamp_max", "Tensor self, Scalar max", values, nullptr,
     [](const Arguments& in, const GateTensors& gates) {
       return replay_clamp(in.tensor(0), gates[0], std::nullopt, in.number(1));
     }},
    {"clamp.Tensor", "Tensor self, Tensor? min, Tensor? max", clamp_tensor_gates, nullptr, replay_clamp_tensor},
    {"clamp_min.Tensor", "Tensor self, Tensor min", lower_bound_gates, nullptr, replay_pair},
    {"clamp_max.Tensor", "Tensor self, Tensor max", upper_bound_gates, nullptr, replay_pair},
};

}  // namespace microreg::inline MICROREG_ABI::detail::gating
