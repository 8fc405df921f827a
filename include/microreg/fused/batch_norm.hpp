/// @file
/// Double backward of batch normalisation in training mode in two passes over memory.
#pragma once

#include <ATen/ATen.h>
#include <microreg/detail/config.hpp>
#include <microreg/fused/norm_kernels.hpp>
#include <microreg/fused/normalisation.hpp>
#include <microreg/fused/rule.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// The problem of a call, and what came in for its results.
inline NormProblem batch_norm_problem(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                      const at::Tensor& mean, const at::Tensor& rstd, const Tensors& upstream) {
  std::vector<std::int64_t> shape(static_cast<std::size_t>(x.dim()), 1);
  shape[1] = x.size(1);
  const auto channel = [&](const at::Tensor& t) { return t.defined() ? t.reshape(shape) : t; };
  std::vector<std::int64_t> dims{0};
  for (std::int64_t d = 2; d < x.dim(); ++d) {
    dims.push_back(d);
  }
  return {
      dy,   x, channel(weight), channel(mean), channel(rstd), upstream[0], channel(upstream[1]), channel(upstream[2]),
      dims, {}};
}

/// On the CPU by the kernels, in the layout of x.
inline Tensors batch_norm_double_backward(const NormProblem& problem, OutputMask needs) {
  const auto [d_dy, d_x, d_weight] = norm_double_backward(problem, needs, [](const NormProblem& p, auto zero) {
    using T = decltype(zero);
    const std::int64_t batch = p.x.size(0), channels = p.x.size(1), plane = p.x.numel() / (batch * channels);
    const bool columns = plane < Lanes<T>::count || p.x.suggest_memory_format() != at::MemoryFormat::Contiguous;
    return columns ? column_norm<T>(p)
                   : channel_norm<T>(p,
                                     {.rows = channels,
                                      .parts = 1,
                                      .runs = batch,
                                      .length = plane,
                                      .row_step = 1,
                                      .part_step = 0,
                                      .run_step = channels},
                                     channels);
  });
  return {d_dy, d_x, needs[2] ? d_weight.flatten() : at::Tensor()};
}

inline bool batch_norm_fits(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& rstd) {
  return x.dim() >= 2 && x.numel() > 0 && mean.defined() && rstd.defined() && mean.numel() == x.size(1) &&
         rstd.numel() == x.size(1) && wide_type(mean.scalar_type()) == wide_type(x.scalar_type()) &&
         wide_type(rstd.scalar_type()) == wide_type(x.scalar_type());
}

/// `dy` as LibTorch 2.13 can take it on the CPU. Where a dimension has one element (a batch of one, as all of instance
/// normalisation is, whose samples are channels; a map of one row), strides do not tell the layout, and it may take a
/// gradient that lies otherwise than the input for one that lies alike: wrong, without a word. A sum of gradients in
/// both layouts can be such a one. It is right where the gradient lies as the input does: copied, or only looked at
/// otherwise where they differ in dimensions of one element alone.
inline at::Tensor laid_out_as_input(const at::Tensor& x, const at::Tensor& dy) {
  const at::IntArrayRef sizes = x.sizes();
  if (!x.is_cpu() || std::find(sizes.begin(), sizes.end(), 1) == sizes.end() || dy.strides() == x.strides() ||
      dy.sizes() != sizes || !x.is_non_overlapping_and_dense()) {
    return dy;
  }
  for (std::int64_t d = 0; d < x.dim(); ++d) {
    if (sizes[static_cast<std::size_t>(d)] > 1 && dy.stride(d) != x.stride(d)) {
      return at::empty_strided(sizes, x.strides(), dy.options()).copy_(dy);
    }
  }
  return dy.as_strided(sizes, x.strides());
}

inline constexpr Rule native_batch_norm_backward_rule{
    .schema =
        "aten::native_batch_norm_backward(Tensor grad_out, Tensor input, Tensor? weight, Tensor? running_mean, Tensor? "
        "running_var, Tensor? save_mean, Tensor? save_invstd, bool train, float eps, bool[3] output_mask) -> (Tensor, "
        "Tensor, Tensor)",
    .inputs = {0, 1, 2},
    .saved = {0, 1, 2, 5, 6},
    .derivative =
        [](const Call& call, const Tensors& upstream, OutputMask needs) {
          return batch_norm_double_backward(batch_norm_problem(call.tensor(0), call.tensor(1), call.tensor(2),
                                                               call.tensor(5), call.tensor(6), upstream),
                                            needs);
        },
    .fits =
        [](const Call& call) {
          return call.arguments[7].toBool() && batch_norm_fits(call.tensor(1), call.tensor(5), call.tensor(6));
        },
    .repaired = [](const Call& call) { return call.with(0, laid_out_as_input(call.tensor(1), call.tensor(0))); },
    .halves = HalfTypes::widened_by_formula};

/// cuDNN keeps 1/sqrt(var + eps) under the name of save_var.
inline constexpr Rule cudnn_batch_norm_backward_rule{
    .schema =
        "aten::cudnn_batch_norm_backward(Tensor input, Tensor grad_output, Tensor weight, Tensor? running_mean, "
        "Tensor? running_var, Tensor? save_mean, Tensor? save_var, float epsilon, Tensor reserveSpace) -> (Tensor, "
        "Tensor, Tensor)",
    .inputs = {1, 0, 2},
    .saved = {0, 1, 2, 5, 6},
    .derivative =
        [](const Call& call, const Tensors& upstream, OutputMask needs) {
          return native_batch_norm_backward_rule.derivative(call.with(0, call.tensor(1)).with(1, call.tensor(0)),
                                                            upstream, needs);
        },
    .fits = [](const Call& call) { return batch_norm_fits(call.tensor(0), call.tensor(5), call.tensor(6)); },
    .halves = HalfTypes::widened_by_formula};

}  // namespace microreg::inline MICROREG_ABI::detail
