/// @file
/// logit, which clamps what it is given.
#pragma once

#include <ATen/ATen.h>
#include <microreg/detail/tensors.hpp>
#include <microreg/gates/clamp.hpp>
#include <microreg/gates/kinked_operation.hpp>

namespace microreg::inline MICROREG_ABI::detail::gating {

inline constexpr KinkedOperation logits[] = {
    {"logit", "Tensor self, float? eps", [](const Arguments& in) { return GateTensors{in.tensor(0).detach().clone()}; },
     nullptr,
     [](const Arguments& in, const GateTensors& gates) {
       const double low = in.number(1);
       return Tensors{at::logit(replay_clamp(in.tensor(0), gates[0], low, 1 - low, /*passes=*/true).front())};
     },
     [](const Arguments& in) { return in.given(1); }},
};

}  // namespace microreg::inline MICROREG_ABI::detail::gating
