/// @file
/// Group normalisation with the double backward of layer normalisation, which it is within a group of channels.
///
/// LibTorch's backward with create_graph composes it of elementary operations, and there is no operation to get in
/// front of. So the forward pass is recorded.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <microreg/detail/interception.hpp>
#include <microreg/fused/layer_norm.hpp>
#include <microreg/fused/output_mask.hpp>
#include <microreg/fused/statistics.hpp>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>

namespace microreg::detail {

/// Tensors of group normalisation in the shapes of LayerNormInputs: rows are samples, and what belongs to a channel is
/// repeated for its elements.
struct ChannelGroups {
  std::int64_t batch, channels, plane, groups;

  ChannelGroups(const at::Tensor& x, std::int64_t group_count)
      : batch(x.size(0)), channels(x.size(1)), plane(x.numel() / (batch * channels)), groups(group_count) {}

  [[nodiscard]] at::Tensor rows(const at::Tensor& t) const {
    return t.defined() ? t.contiguous().view({batch, groups, -1}) : t;
  }
  [[nodiscard]] at::Tensor repeated(const at::Tensor& t) const {
    return t.defined() ? t.view({channels, 1}).expand({channels, plane}).contiguous().view({groups, -1}) : t;
  }
  [[nodiscard]] at::Tensor statistics(const at::Tensor& t) const { return t.view({batch, groups}); }
  /// The inverse of repeated(), summed.
  [[nodiscard]] at::Tensor per_channel(const at::Tensor& t) const { return t.view({channels, plane}).sum(1); }
};

/// d_x, d_weight, d_bias by elementary operations, which any transform and any order of derivative can take.
inline std::array<at::Tensor, 3> group_norm_backward_aten(const at::Tensor& dy, const at::Tensor& x,
                                                          const at::Tensor& weight, const at::Tensor& rstd,
                                                          std::int64_t group_count) {
  const ChannelGroups shape(x, group_count);
  const at::Tensor rows = shape.rows(x);
  const at::Tensor dys = dy.reshape(rows.sizes());
  const auto [mean, r] = differentiable_statistics(rows, {-1}, shape.statistics(rstd));
  const at::Tensor xh = (rows - mean.unsqueeze(-1)) * r.unsqueeze(-1);
  const at::Tensor h = weight.defined() ? dys * shape.repeated(weight) : dys;
  const auto average = [](const at::Tensor& z) { return z.mean(-1, /*keepdim=*/true); };
  return {((h - average(h) - xh * average(h * xh)) * r.unsqueeze(-1)).view(x.sizes()),
          shape.per_channel((dys * xh).sum(0)), shape.per_channel(dys.sum(0))};
}

/// Group normalisation's backward as a node with the double backward of layer_norm_double_backward().
struct GroupNormBackward : torch::autograd::Function<GroupNormBackward> {
  static ThreeTensors stock(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& mean,
                            const at::Tensor& rstd, std::int64_t groups, OutputMask mask) {
    const auto format = x.is_cpu() ? x.suggest_memory_format() : at::MemoryFormat::Contiguous;
    const ChannelGroups shape(x, groups);
    return at::native_group_norm_backward(dy.contiguous(format), x.contiguous(format), mean, rstd,
                                          weight.defined() ? std::optional(weight) : std::nullopt, shape.batch,
                                          shape.channels, shape.plane, groups, mask);
  }

  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const at::Tensor& dy,
                                                const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                                const at::Tensor& mean, const at::Tensor& rstd, std::int64_t groups,
                                                OutputMask mask) {
    const at::Tensor w = weight.value_or(at::Tensor());
    context->save_for_backward({dy, x, w, mean, rstd});
    context->set_materialize_grads(false);
    context->saved_data["groups"] = groups;
    context->saved_data["mask"] = pack(mask);
    auto [d_x, d_weight, d_bias] = stock(dy, x, w, mean, rstd, groups, mask);
    return gather(mask, {d_x, d_weight, d_bias});
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list upstream) {
    const auto saved = context->get_saved_variables();
    const at::Tensor &dy = saved[0], &x = saved[1], &weight = saved[2], &mean = saved[3], &rstd = saved[4];
    const auto [v, a, b] = spread(unpack(context->saved_data["mask"]), std::move(upstream));
    if (!v.defined() && !a.defined() && !b.defined()) {
      return {{}, {}, {}, {}, {}, {}, {}};
    }
    const ChannelGroups shape(x, context->saved_data["groups"].toInt());
    auto out = layer_norm_double_backward(
        {shape.rows(dy), shape.rows(x), shape.repeated(weight), shape.statistics(mean), shape.statistics(rstd),
         shape.rows(v), shape.repeated(a), shape.repeated(b)},
        {context->needs_input_grad(0), context->needs_input_grad(1), weight.defined() && context->needs_input_grad(2)});
    for (std::size_t i = 0; i < 2; ++i) {
      out[i] = out[i].defined() ? out[i].view(x.sizes()) : out[i];
    }
    out[2] = out[2].defined() ? shape.per_channel(out[2]) : out[2];
    return {out[0], out[1], out[2], {}, {}, {}, {}};
  }
};

/// Group normalisation as a node whose backward is recorded as a GroupNormBackward.
struct GroupNorm : torch::autograd::Function<GroupNorm> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x,
                            const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                            std::int64_t groups, double eps) {
    const ChannelGroups shape(x, groups);
    const auto format = x.is_cpu() ? x.suggest_memory_format() : at::MemoryFormat::Contiguous;
    auto [y, mean, rstd] = at::native_group_norm(x.contiguous(format), weight, bias, shape.batch, shape.channels,
                                                 shape.plane, groups, eps);
    context->save_for_backward({x, weight.value_or(at::Tensor()), mean, rstd});
    context->set_materialize_grads(false);
    context->saved_data["groups"] = groups;
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list upstream) {
    const at::Tensor& dy = upstream[0];
    if (!dy.defined()) {
      return {{}, {}, {}, {}, {}};
    }
    const auto saved = context->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &mean = saved[2], &rstd = saved[3];
    const std::int64_t groups = context->saved_data["groups"].toInt();
    // A tensor that is not there has no edge; without a weight there is no bias either.
    const bool affine = weight.defined();
    const OutputMask mask{context->needs_input_grad(0), affine && context->needs_input_grad(1),
                          affine && context->needs_input_grad(2)};
    if (!at::GradMode::is_enabled()) {
      auto [d_x, d_weight, d_bias] = GroupNormBackward::stock(dy, x, weight, mean, rstd, groups, mask);
      return {d_x, d_weight, d_bias, {}, {}};
    }
    if (should_fuse({dy, x, weight})) {
      const auto w = weight.defined() ? std::optional(weight) : std::nullopt;
      auto [d_x, d_weight, d_bias] = spread(mask, GroupNormBackward::apply(dy, x, w, mean, rstd, groups, mask));
      return {d_x, d_weight, d_bias, {}, {}};
    }
    auto [d_x, d_weight, d_bias] = group_norm_backward_aten(dy, x, weight, rstd, groups);
    const at::Tensor none;
    return {mask[0] ? d_x : none, mask[1] ? d_weight : none, mask[2] ? d_bias : none, {}, {}};
  }
};

inline at::Tensor group_norm_kernel(const at::Tensor& x, std::int64_t groups, const std::optional<at::Tensor>& weight,
                                    const std::optional<at::Tensor>& bias, double eps, bool cudnn_enabled) {
  const StockKernels stock;
  const at::Tensor w = weight.value_or(at::Tensor());
  const at::Tensor b = bias.value_or(at::Tensor());
  const auto fits = [&](const at::Tensor& t) { return t.dim() == 1 && t.size(0) == x.size(1); };
  if (x.dim() < 2 || x.numel() == 0 || groups <= 0 || x.size(1) % groups != 0 || w.defined() != b.defined() ||
      (w.defined() && !(fits(w) && fits(b))) || !should_fuse({x, w, b})) {
    return at::group_norm(x, groups, weight, bias, eps, cudnn_enabled);
  }
  return GroupNorm::apply(x, weight, bias, groups, eps);
}

}  // namespace microreg::detail
