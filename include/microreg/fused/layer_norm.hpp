/// @file
/// Double backward of layer normalisation, and of its relatives, in one pass over memory.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <microreg/detail/interception.hpp>
#include <microreg/fused/layer_norm_kernels.hpp>
#include <microreg/fused/output_mask.hpp>
#include <microreg/fused/statistics.hpp>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace microreg::detail {

/// What layer normalisation's backward read, and the gradients that came in for its results: dy, x, v are
/// [rows, groups, length], mean and rstd [rows, groups], weight, a, b [groups, length]. Normalised is over `length`;
/// layer normalisation itself has one group.
struct LayerNormInputs {
  at::Tensor dy, x, weight, mean, rstd;  // weight may be undefined
  at::Tensor v, a, b;                    // for d_x, d_weight, d_bias; each may be undefined (zero)
};

/// d_dy, d_x, d_weight on any device, differentiable where a graph is recorded; see LayerNormRows for the formulas.
inline std::array<at::Tensor, 3> layer_norm_double_backward_aten(const LayerNormInputs& in, OutputMask needs) {
  const at::Tensor r = in.rstd.unsqueeze(-1);
  const at::Tensor xh = (in.x - in.mean.unsqueeze(-1)) * r;
  const auto mean = [](const at::Tensor& z) { return z.mean(-1, /*keepdim=*/true); };
  const auto project = [&](const at::Tensor& z) { return z - mean(z) - xh * mean(z * xh); };
  const at::Tensor h = in.weight.defined() ? in.dy * in.weight : in.dy;
  std::array<at::Tensor, 3> out;
  const at::Tensor pv = in.v.defined() ? project(in.v) * r : at::Tensor();
  if (needs[0]) {
    at::Tensor& d_dy = out[0];
    d_dy = pv.defined() ? (in.weight.defined() ? pv * in.weight : pv.clone()) : at::zeros_like(in.dy);
    if (in.a.defined()) {
      d_dy.addcmul_(xh, in.a);
    }
    if (in.b.defined()) {
      d_dy.add_(in.b);
    }
  }
  if (needs[1]) {
    at::Tensor& d_x = out[1];
    d_x = in.a.defined() ? project(in.dy * in.a) * r : at::zeros_like(in.x);
    if (in.v.defined()) {
      const at::Tensor mean_vx = mean(in.v * xh);
      const at::Tensor mean_hx = mean(h * xh);
      const at::Tensor cov_over_m = mean(in.v * h) - mean(in.v) * mean(h) - mean_vx * mean_hx;
      d_x.sub_(r * r * (mean_vx * project(h) + mean_hx * project(in.v) + cov_over_m * xh));
    }
  }
  if (needs[2]) {
    out[2] = pv.defined() ? (in.dy * pv).sum(0) : at::zeros_like(in.weight);
  }
  return out;
}

template <class T>
std::array<at::Tensor, 3> layer_norm_double_backward_cpu(const LayerNormInputs& in, OutputMask needs) {
  const auto pointer = [](const at::Tensor& t) { return t.defined() ? t.const_data_ptr<T>() : nullptr; };
  std::array<at::Tensor, 3> out;
  out[0] = needs[0] ? at::empty_like(in.x) : at::Tensor();
  out[1] = needs[1] ? at::empty_like(in.x) : at::Tensor();
  out[2] = needs[2] ? at::empty_like(in.weight) : at::Tensor();
  const auto writable = [](at::Tensor& t) { return t.defined() ? t.mutable_data_ptr<T>() : nullptr; };
  layer_norm_rows(LayerNormProblem<T>{pointer(in.x), pointer(in.dy), pointer(in.v), pointer(in.mean), pointer(in.rstd),
                                      pointer(in.weight), pointer(in.a), pointer(in.b), writable(out[0]),
                                      writable(out[1]), in.mean.numel(), in.x.size(1), in.x.size(2)},
                  writable(out[2]));
  return out;
}

/// All tensors contiguous.
inline std::array<at::Tensor, 3> layer_norm_double_backward(LayerNormInputs in, OutputMask needs) {
  if (at::GradMode::is_enabled()) {
    std::tie(in.mean, in.rstd) = differentiable_statistics(in.x, {-1}, in.rstd);
    return layer_norm_double_backward_aten(in, needs);
  }
  if (!in.x.is_cpu()) {
    return layer_norm_double_backward_aten(in, needs);
  }
  return in.x.scalar_type() == at::kDouble ? layer_norm_double_backward_cpu<double>(in, needs)
                                           : layer_norm_double_backward_cpu<float>(in, needs);
}

/// Layer normalisation's backward as a node with the double backward above.
struct LayerNormBackward : torch::autograd::Function<LayerNormBackward> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const at::Tensor& dy,
                                                const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                                const std::optional<at::Tensor>& bias, const at::Tensor& mean,
                                                const at::Tensor& rstd, const std::vector<std::int64_t>& shape,
                                                OutputMask mask) {
    context->save_for_backward({dy, x, weight.value_or(at::Tensor()), mean, rstd});
    context->set_materialize_grads(false);
    context->saved_data["mask"] = pack(mask);
    auto [d_x, d_weight, d_bias] = at::native_layer_norm_backward(dy, x, shape, mean, rstd, weight, bias, mask);
    return gather(mask, {d_x, d_weight, d_bias});
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list upstream) {
    const auto saved = context->get_saved_variables();
    const at::Tensor &dy = saved[0], &x = saved[1], &weight = saved[2], &mean = saved[3], &rstd = saved[4];
    const auto [v, a, b] = spread(unpack(context->saved_data["mask"]), std::move(upstream));
    if (!v.defined() && !a.defined() && !b.defined()) {
      return {{}, {}, {}, {}, {}, {}, {}, {}};
    }
    const std::int64_t rows = mean.numel();
    const auto as_rows = [&](const at::Tensor& t) { return t.defined() ? t.contiguous().view({rows, 1, -1}) : t; };
    const auto flat = [](const at::Tensor& t) { return t.defined() ? t.contiguous().view({1, -1}) : t; };
    auto out = layer_norm_double_backward(
        {as_rows(dy), as_rows(x), flat(weight), mean.view({rows, 1}), rstd.view({rows, 1}), as_rows(v), flat(a),
         flat(b)},
        {context->needs_input_grad(0), context->needs_input_grad(1), weight.defined() && context->needs_input_grad(2)});
    for (std::size_t i = 0; i < 3; ++i) {
      out[i] = out[i].defined() ? out[i].view(saved[i].sizes()) : out[i];
    }
    return {out[0], out[1], out[2], {}, {}, {}, {}, {}};
  }
};

inline ThreeTensors native_layer_norm_backward_kernel(const at::Tensor& dy, const at::Tensor& x,
                                                      c10::SymIntArrayRef normalized_shape, const at::Tensor& mean,
                                                      const at::Tensor& rstd, const std::optional<at::Tensor>& weight,
                                                      const std::optional<at::Tensor>& bias, OutputMask mask) {
  const StockKernels stock;
  const at::Tensor w = weight.value_or(at::Tensor());
  if (!should_fuse({dy, x, w}) || !(mask[0] || mask[1] || mask[2]) || x.numel() == 0 ||
      mean.scalar_type() != x.scalar_type() || rstd.scalar_type() != x.scalar_type()) {
    return at::_ops::native_layer_norm_backward::call(dy, x, normalized_shape, mean, rstd, weight, bias, mask);
  }
  return spread(mask, LayerNormBackward::apply(dy, x, weight, bias, mean, rstd,
                                               C10_AS_INTARRAYREF_SLOW(normalized_shape).vec(), mask));
}

}  // namespace microreg::detail
