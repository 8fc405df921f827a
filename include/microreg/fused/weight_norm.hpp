/// @file
/// Double backward of weight normalisation. LibTorch's holds the norms constant, and is wrong without a word.
#pragma once

#include <ATen/ATen.h>
#include <microreg/detail/config.hpp>
#include <microreg/fused/rule.hpp>

#include <cstdint>

namespace microreg::inline MICROREG_ABI::detail {

/// w = g v / ||v||, the norm over all dimensions but one. With q = sum of dw v over those:
///
///     d_g = q / ||v||        d_v = g / ||v|| (dw - v q / ||v||^2)
///
/// by differentiable operations, the norm among them.
inline constexpr Rule weight_norm_rule{
    .schema = "aten::_weight_norm_interface(Tensor v, Tensor g, int dim=0) -> (Tensor, Tensor)",
    .inputs = {0, 1},
    .saved = {0, 1},
    .derivative = [](const Call& call, const Tensors& upstream, OutputMask /*needs*/) -> Tensors {
      const at::Tensor v = call.tensor(0), g = call.tensor(1), dw = upstream[0];
      if (!dw.defined()) {
        return {at::Tensor(), at::Tensor()};  // the norms are handed out for the backward pass alone
      }
      const at::Tensor norm = at::norm_except_dim(v, 2, call.arguments[2].toInt());
      const at::Tensor q = at::sum_to(dw * v, norm.sizes());
      return {(dw - v * (q / norm.square())) * (g / norm), at::sum_to(q / norm, g.sizes())};
    },
};

}  // namespace microreg::inline MICROREG_ABI::detail
