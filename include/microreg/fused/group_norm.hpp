/// @file
/// Double backward of group normalisation in one pass over memory.
///
/// LibTorch's backward with create_graph composes it of elementary operations, and there is no operation to get in
/// front of. So the forward pass is recorded, and its derivative is a recorded call too.
#pragma once

#include <ATen/ATen.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/interceptors.hpp>
#include <microreg/fused/norm_kernels.hpp>
#include <microreg/fused/normalisation.hpp>
#include <microreg/fused/rule.hpp>

#include <array>
#include <cstdint>
#include <tuple>
#include <utility>

namespace microreg::inline MICROREG_ABI::detail {

/// The problem of a call as [sample, group, channel of the group, pixel], and what came in for its results.
inline NormProblem group_norm_problem(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                      const at::Tensor& mean, const at::Tensor& rstd, std::int64_t groups,
                                      const Tensors& upstream) {
  const std::int64_t batch = x.size(0), channels = x.size(1), plane = x.numel() / (batch * channels);
  const auto pixels = [&](const at::Tensor& t) {
    return t.defined() ? t.reshape({batch, groups, channels / groups, plane}) : t;
  };
  const auto channel = [&](const at::Tensor& t) { return t.defined() ? t.reshape({groups, channels / groups, 1}) : t; };
  const auto group = [&](const at::Tensor& t) { return t.reshape({batch, groups, 1, 1}); };
  return {pixels(dy),
          pixels(x),
          channel(weight),
          group(mean),
          group(rstd),
          pixels(upstream[0]),
          channel(upstream[1]),
          channel(upstream[2]),
          {3},
          {2}};
}

inline std::array<at::Tensor, 3> group_norm_double_backward(const NormProblem& problem, OutputMask needs) {
  return norm_double_backward(problem, needs, [](const NormProblem& p, auto zero) {
    const std::int64_t groups = p.x.size(1), channels = p.x.size(2);
    return channel_norm<decltype(zero)>(p,
                                        {.rows = p.x.size(0) * groups,
                                         .parts = channels,
                                         .runs = 1,
                                         .length = p.x.size(3),
                                         .row_step = channels,
                                         .part_step = 1,
                                         .run_step = 0},
                                        groups * channels);
  });
}

/// d_x, d_weight, d_bias by elementary operations, which any transform and any order of derivative can take.
inline Tensors group_norm_backward_aten(const NormProblem& p, const at::Tensor& x) {
  const at::Tensor xh = (p.x - p.mean) * p.rstd;
  const at::Tensor h = p.weight.defined() ? p.dy * p.weight : p.dy;
  const auto mean = [](const at::Tensor& z) { return z.mean(at::IntArrayRef{2, 3}, /*keepdim=*/true); };
  const auto channels = [](const at::Tensor& z) { return z.sum(at::IntArrayRef{0, 3}).reshape(-1); };
  return {((h - mean(h) - xh * mean(h * xh)) * p.rstd).view(x.sizes()), channels(p.dy * xh), channels(p.dy)};
}

/// Those results that a mask asks for.
inline Tensors wanted(Tensors results, OutputMask needs) {
  for (std::size_t i = 0; i < needs.size(); ++i) {
    results[i] = needs[i] ? results[i] : at::Tensor();
  }
  return results;
}

/// Not called by LibTorch's formulas when they record a graph, but by the rule below.
inline constexpr Rule native_group_norm_backward_rule{
    .schema =
        "aten::native_group_norm_backward(Tensor grad_out, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, "
        "SymInt N, SymInt C, SymInt HxW, int group, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    .inputs = {0, 1, 4},
    .saved = {0, 1, 2, 3, 4},
    .derivative = [](const Call& call, const Tensors& upstream, OutputMask needs) -> Tensors {
      const at::Tensor x = call.tensor(1);
      const auto [d_dy, d_x, d_weight] =
          group_norm_double_backward(group_norm_problem(call.tensor(0), x, call.tensor(4), call.tensor(2),
                                                        call.tensor(3), call.arguments[8].toInt(), upstream),
                                     needs);
      return {needs[0] ? d_dy.view(x.sizes()) : at::Tensor(), needs[1] ? d_x.view(x.sizes()) : at::Tensor(),
              needs[2] ? d_weight.reshape(-1) : at::Tensor()};
    },
    .forward = [](const Call& call) -> Tensors {
      const at::Tensor x = call.tensor(1), mean = call.tensor(2), rstd = call.tensor(3);
      if (!is_coarse_over(x, rstd)) {
        return call.run();
      }
      const NormProblem p =
          group_norm_problem(call.tensor(0), x, call.tensor(4), mean, rstd, call.arguments[8].toInt(), Tensors(3));
      return rounded_to(x.scalar_type(), wanted(group_norm_backward_aten(p.in_float64(), x), call.mask(9)));
    }};

/// Group normalisation itself, whose mean and rstd are kept.
inline constexpr Rule native_group_norm_rule{
    .schema =
        "aten::native_group_norm(Tensor input, Tensor? weight, Tensor? bias, SymInt N, SymInt C, SymInt HxW, int "
        "group, float eps) -> (Tensor, Tensor, Tensor)",
    .inputs = {0, 1, 2},
    .saved = {0, 1},
    .derivative = [](const Call& call, const Tensors& upstream, OutputMask needs) -> Tensors {
      const at::Tensor x = call.tensor(0), weight = call.tensor(1);
      at::Tensor mean = call.tensor(8), rstd = call.tensor(9);
      const at::Tensor dy =
          upstream[0].contiguous(x.is_cpu() ? x.suggest_memory_format() : at::MemoryFormat::Contiguous);
      const auto problem = [&] {  // where it is needed: in channels-last it copies
        return group_norm_problem(dy, x, weight, mean, rstd, call.arguments[6].toInt(), Tensors(3));
      };
      if (at::GradMode::is_enabled() && !should_fuse({dy, x, weight}, HalfTypes::widened)) {
        NormProblem p = problem();
        p.differentiate_statistics();
        return wanted(group_norm_backward_aten(p, x), needs);
      }
      if (is_coarse_over(x, rstd)) {  // LibTorch's own backward pass sums what is not centred
        std::tie(mean, rstd) = problem().exact_statistics(call.arguments[7].toDouble());
      }
      // LibTorch 2.13 reads the memory of d_x in channels-last on the CPU whether it was asked for it or not.
      const bool with_d_x = needs[0] || (x.is_cpu() && x.suggest_memory_format() != at::MemoryFormat::Contiguous);
      const Call backward{
          *find_schema(native_group_norm_backward_rule.schema),
          {dy, x, mean, rstd, weight.defined() ? c10::IValue(weight) : c10::IValue(), call.arguments[3],
           call.arguments[4], call.arguments[5], call.arguments[6], c10::List<bool>({with_d_x, needs[1], needs[2]})}};
      return at::GradMode::is_enabled() ? record(native_group_norm_backward_rule, backward)
                                        : run(native_group_norm_backward_rule, backward, /*fits=*/true);
    },
    .fits =
        [](const Call& call) {
          static const bool has_backward = find_schema(native_group_norm_backward_rule.schema).has_value();
          return has_backward && call.tensor(0).numel() > 0 && call.tensor(0).dim() >= 2 &&
                 call.tensor(1).defined() == call.tensor(2).defined();
        },
    .keeps_results = true,
    .halves = HalfTypes::widened};

}  // namespace microreg::inline MICROREG_ABI::detail
