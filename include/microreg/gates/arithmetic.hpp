/// @file
/// Remainders and quantisation: a smooth piece and a step that the first pass decided.
#pragma once

#include <ATen/ATen.h>
#include <microreg/detail/tensors.hpp>
#include <microreg/gates/kinked_operation.hpp>

#include <tuple>
#include <utility>

namespace microreg::inline MICROREG_ABI::detail::gating {

/// An operand that may be a number.
inline at::Tensor operand(const Arguments& in, std::size_t i) {
  return in.values()[i].isTensor() ? in.tensor(i) : at::scalar_tensor(in.scalar(i), in.tensor(0).options());
}

/// How often the divisor went into the dividend.
template <at::Tensor (*remainder)(const at::Tensor&, const at::Tensor&)>
GateTensors quotient(const Arguments& in) {
  const at::Tensor self = in.tensor(0).detach();
  const at::Tensor other = operand(in, 1).detach();
  return {((self - remainder(self, other)) / other).round()};
}
inline Tensors replay_remainder(const Arguments& in, const GateTensors& gates) {
  return {in.tensor(0) - operand(in, 1) * gates[0]};
}

/// What autograd says about a quantisation: its value, and the input's gradient within the range.
inline Tensors replay_straight_through(const Arguments& in, const GateTensors& gates) {
  return {gates[0] + (in.tensor(0) - gates[2]).masked_fill(gates[1].logical_not(), 0), gates[1]};
}
inline GateTensors straight_through_gates(std::tuple<at::Tensor, at::Tensor> results, const at::Tensor& self) {
  return {std::get<0>(results), std::get<1>(results), self.clone()};
}

inline constexpr KinkedOperation arithmetic[] = {
    {"frac", "Tensor self", [](const Arguments& in) { return GateTensors{in.tensor(0).detach().trunc()}; }, nullptr,
     [](const Arguments& in, const GateTensors& gates) { return Tensors{in.tensor(0) - gates[0]}; }},
    {"fmod.Tensor", "Tensor self, Tensor other", quotient<at::fmod>, nullptr, replay_remainder},
    {"fmod.Scalar", "Tensor self, Scalar other", quotient<at::fmod>, nullptr, replay_remainder},
    {"remainder.Tensor", "Tensor self, Tensor other", quotient<at::remainder>, nullptr, replay_remainder},
    {"remainder.Scalar", "Tensor self, Scalar other", quotient<at::remainder>, nullptr, replay_remainder},
    {"fake_quantize_per_tensor_affine_cachemask",
     "Tensor self, float scale, int zero_point, int quant_min, int quant_max -> Tensor, Tensor",
     [](const Arguments& in) {
       const at::Tensor self = in.tensor(0).detach();
       return straight_through_gates(at::fake_quantize_per_tensor_affine_cachemask(self, in.number(1), in.integer(2),
                                                                                   in.integer(3), in.integer(4)),
                                     self);
     },
     nullptr, replay_straight_through},
    {"fake_quantize_per_channel_affine_cachemask",
     "Tensor self, Tensor scale, Tensor zero_point, int axis, int quant_min, int quant_max -> Tensor, Tensor",
     [](const Arguments& in) {
       const at::Tensor self = in.tensor(0).detach();
       return straight_through_gates(at::fake_quantize_per_channel_affine_cachemask(
                                         self, in.tensor(1), in.tensor(2), in.integer(3), in.integer(4), in.integer(5)),
                                     self);
     },
     nullptr, replay_straight_through},
};

}  // namespace microreg::inline MICROREG_ABI::detail::gating
