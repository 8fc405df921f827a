/// @file
/// abs and copysign: a magnitude with a sign that the first pass decided.
#pragma once

#include <ATen/ATen.h>
#include <microreg/detail/tensors.hpp>
#include <microreg/gates/kinked_operation.hpp>

#include <cmath>

namespace microreg::inline MICROREG_ABI::detail::gating {

inline constexpr KinkedOperation signs[] = {
    // The sign of the first input times the second.
    {"abs", "Tensor self", [](const Arguments& in) { return GateTensors{in.tensor(0).sign().to(at::kChar)}; }, nullptr,
     [](const Arguments& in, const GateTensors& gates) {
       return Tensors{in.tensor(0) * gates[0].to(in.tensor(0).scalar_type())};
     }},
    composed("copysign.Tensor", "Tensor self, Tensor other",
             [](const Arguments& in, const GateTensors&) {
               return Tensors{in.tensor(0).abs() * at::where(in.tensor(1).signbit(), -1, 1)};
             }),
    composed("copysign.Scalar", "Tensor self, Scalar other",
             [](const Arguments& in, const GateTensors&) {
               return Tensors{in.tensor(0).abs() * (std::signbit(in.number(1)) ? -1 : 1)};
             }),
};

}  // namespace microreg::inline MICROREG_ABI::detail::gating
