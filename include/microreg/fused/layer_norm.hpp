/// @file
/// Double backward of layer normalisation in one pass over memory.
#pragma once

#include <ATen/ATen.h>
#include <microreg/detail/config.hpp>
#include <microreg/fused/norm_kernels.hpp>
#include <microreg/fused/normalisation.hpp>
#include <microreg/fused/rule.hpp>

#include <array>
#include <cstdint>

namespace microreg::inline MICROREG_ABI::detail {

/// The problem of a call as a matrix whose rows are normalised, and what came in for its results.
inline NormProblem layer_norm_problem(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                      const at::Tensor& mean, const at::Tensor& rstd, const Tensors& upstream) {
  const std::int64_t rows = mean.numel();
  const auto matrix = [&](const at::Tensor& t) { return t.defined() ? t.reshape({rows, -1}) : t; };
  const auto vector = [](const at::Tensor& t) { return t.defined() ? t.reshape(-1) : t; };
  return {matrix(dy),          matrix(x),           vector(weight),      matrix(mean), matrix(rstd),
          matrix(upstream[0]), vector(upstream[1]), vector(upstream[2]), {},           {1}};
}

inline std::array<at::Tensor, 3> layer_norm_double_backward(const NormProblem& problem, OutputMask needs) {
  return norm_double_backward(problem, needs,
                              [](const NormProblem& p, auto zero) { return element_norm<decltype(zero)>(p); });
}

inline constexpr Rule native_layer_norm_backward_rule{
    .schema =
        "aten::native_layer_norm_backward(Tensor grad_out, Tensor input, SymInt[] normalized_shape, Tensor mean, "
        "Tensor rstd, Tensor? weight, Tensor? bias, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    .inputs = {0, 1, 5},
    .saved = {0, 1, 3, 4, 5},
    .derivative = [](const Call& call, const Tensors& upstream, OutputMask needs) -> Tensors {
      const at::Tensor x = call.tensor(1), weight = call.tensor(5);
      const auto [d_dy, d_x, d_weight] = layer_norm_double_backward(
          layer_norm_problem(call.tensor(0), x, weight, call.tensor(3), call.tensor(4), upstream), needs);
      const auto like = [](const at::Tensor& result, const at::Tensor& t, bool needed) {
        return needed ? result.view(t.sizes()) : at::Tensor();
      };
      return {like(d_dy, x, needs[0]), like(d_x, x, needs[1]), like(d_weight, weight, needs[2])};
    },
    .fits =
        [](const Call& call) {
          const at::Tensor x = call.tensor(1);
          const at::ScalarType type = wide_type(x.scalar_type());
          return x.numel() > 0 && wide_type(call.tensor(3).scalar_type()) == type &&
                 wide_type(call.tensor(4).scalar_type()) == type;
        },
    .halves = HalfTypes::widened_by_formula};

}  // namespace microreg::inline MICROREG_ABI::detail
