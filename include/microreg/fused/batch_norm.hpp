/// @file
/// Double backward of batch normalisation in training mode in two passes over memory.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <microreg/detail/interception.hpp>
#include <microreg/fused/batch_norm_kernels.hpp>
#include <microreg/fused/output_mask.hpp>
#include <microreg/fused/statistics.hpp>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

namespace microreg::detail {

/// What batch normalisation's backward read, and the gradients that came in for its results.
struct BatchNormInputs {
  at::Tensor dy, x, weight, mean, invstd;  // weight may be undefined
  at::Tensor v, a, b;                      // for d_x, d_weight, d_bias; each may be undefined (zero)
};
struct BatchNormResults {
  at::Tensor d_dy, d_x, d_weight;
};

inline std::vector<std::int64_t> all_but_channels(const at::Tensor& x) {
  std::vector<std::int64_t> dims{0};
  for (std::int64_t d = 2; d < x.dim(); ++d) {
    dims.push_back(d);
  }
  return dims;
}

/// On any device by ATen's reductions and few elementwise operations; see batch_norm_coefficients() for the formulas.
/// On CUDA the sums come from the fused reduction that SyncBatchNorm uses, which has no derivative. Differentiable
/// where a graph is recorded.
inline BatchNormResults batch_norm_double_backward_aten(const BatchNormInputs& in, std::array<bool, 3> needs) {
  const at::Tensor& x = in.x;
  const std::int64_t per_channel = x.numel() / x.size(1);
  const auto m = static_cast<double>(per_channel);
  std::vector<std::int64_t> shape(static_cast<std::size_t>(x.dim()), 1);
  shape[1] = x.size(1);
  const auto channel = [&](const at::Tensor& value) { return value.reshape(shape); };
  const at::Tensor centred_mean = channel(in.mean);
  const std::vector<std::int64_t> dims = all_but_channels(x);
  // {sum z, sum z (x - mean)} per channel.
  const auto sums = [&](const at::Tensor& z) -> std::pair<at::Tensor, at::Tensor> {
    if (!z.defined()) {
      const at::Tensor zero = at::zeros_like(in.mean);
      return {zero, zero};
    }
    if (x.is_cuda() && !at::GradMode::is_enabled()) {
      auto [sum, sum_xmu, unused_weight, unused_bias] = at::batch_norm_backward_reduce(
          z.contiguous(x.suggest_memory_format()), x, in.mean, in.invstd, in.weight, true, false, false);
      return {sum, sum_xmu};
    }
    return {z.sum(dims), (z * (x - centred_mean)).sum(dims)};
  };
  const at::Tensor& r = in.invstd;
  const auto [sum_v, sum_vx] = sums(in.v);
  const auto [sum_dy, sum_dyx] = sums(in.dy);
  const at::Tensor mean_v = sum_v / m;
  const at::Tensor mean_vx = sum_vx * r / m;
  const at::Tensor mean_dy = sum_dy / m;
  const at::Tensor mean_dyx = sum_dyx * r / m;
  const at::Tensor wr = in.weight.defined() ? in.weight * r : r;
  const at::Tensor a = in.a.defined() ? in.a : at::zeros_like(r);
  const at::Tensor k1 = a - wr * mean_vx;
  const at::Tensor k2 = -wr * mean_dyx;

  BatchNormResults out;
  const at::Tensor sum_vdy = in.v.defined() ? (in.v * in.dy).sum(dims) : at::zeros_like(r);
  const at::Tensor cov = sum_vdy - m * mean_v * mean_dy - m * mean_vx * mean_dyx;
  if (needs[0]) {
    const at::Tensor a2 = k1 * r;
    at::Tensor a3 = -wr * mean_v - a2 * in.mean;
    if (in.b.defined()) {
      a3 = a3 + in.b;
    }
    out.d_dy = at::addcmul(channel(a3), x, channel(a2));
    if (in.v.defined()) {
      out.d_dy.addcmul_(in.v, channel(wr));
    }
  }
  if (needs[1]) {
    const at::Tensor b3 = r * (-r * (k1 * mean_dyx + k2 * mean_vx) - wr * r * cov / m);
    const at::Tensor b4 = -r * (k1 * mean_dy + k2 * mean_v) - b3 * in.mean;
    out.d_x = at::addcmul(channel(b4), x, channel(b3));
    out.d_x.addcmul_(in.dy, channel(r * k1));
    if (in.v.defined()) {
      out.d_x.addcmul_(in.v, channel(r * k2));
    }
  }
  if (needs[2]) {
    out.d_weight = r * cov;
  }
  return out;
}

/// On the CPU by the kernels of batch_norm_kernels.hpp, in the layout of x.
template <class T>
BatchNormResults batch_norm_double_backward_cpu(const BatchNormInputs& in, std::array<bool, 3> needs) {
  const at::MemoryFormat format = in.x.suggest_memory_format();
  const bool channels_last = format != at::MemoryFormat::Contiguous;
  const at::Tensor x = in.x.contiguous(format);
  const at::Tensor dy = in.dy.contiguous(format);
  const at::Tensor v = in.v.defined() ? in.v.contiguous(format) : at::Tensor();
  const auto pointer = [](const at::Tensor& t) { return t.defined() ? t.const_data_ptr<T>() : nullptr; };
  const at::Tensor mean = in.mean.contiguous();
  const at::Tensor invstd = in.invstd.contiguous();
  const at::Tensor weight = in.weight.defined() ? in.weight.contiguous() : at::Tensor();
  const at::Tensor a = in.a.defined() ? in.a.contiguous() : at::Tensor();
  const at::Tensor b = in.b.defined() ? in.b.contiguous() : at::Tensor();

  BatchNormResults out;
  if (needs[0]) {
    out.d_dy = at::empty_like(x, format);
  }
  if (needs[1]) {
    out.d_x = at::empty_like(x, format);
  }
  if (needs[2]) {
    out.d_weight = at::empty_like(invstd);
  }
  const auto writable = [](at::Tensor& t) { return t.defined() ? t.mutable_data_ptr<T>() : nullptr; };
  const std::int64_t channels = x.size(1);
  const std::int64_t plane = x.numel() / (x.size(0) * channels);
  BatchNormProblem<T> problem{
      pointer(x), pointer(dy), pointer(v),         pointer(mean),     pointer(invstd),        pointer(weight),
      pointer(a), pointer(b),  writable(out.d_dy), writable(out.d_x), writable(out.d_weight), x.size(0),
      channels,   plane};
  if (channels_last || plane == 1) {
    problem.batch *= problem.plane;
    problem.plane = 1;
    batch_norm_rows(problem);
  } else {
    batch_norm_planes(problem);
  }
  return out;
}

inline BatchNormResults batch_norm_double_backward(BatchNormInputs in, std::array<bool, 3> needs) {
  if (at::GradMode::is_enabled()) {
    std::tie(in.mean, in.invstd) = differentiable_statistics(in.x, all_but_channels(in.x), in.invstd);
    return batch_norm_double_backward_aten(in, needs);
  }
  if (!in.x.is_cpu()) {
    return batch_norm_double_backward_aten(in, needs);
  }
  return in.x.scalar_type() == at::kDouble ? batch_norm_double_backward_cpu<double>(in, needs)
                                           : batch_norm_double_backward_cpu<float>(in, needs);
}

/// The arguments that native_batch_norm_backward and cudnn_batch_norm_backward share.
struct BatchNormCall {
  at::Tensor running_mean, running_var;
  double eps = 0;
  OutputMask mask{};
  at::Tensor reserve;  // defined: cuDNN's
};

inline std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

inline ThreeTensors stock_batch_norm_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                              const at::Tensor& mean, const at::Tensor& invstd,
                                              const BatchNormCall& call) {
  if (call.reserve.defined()) {
    return at::cudnn_batch_norm_backward(x, dy, weight, optional(call.running_mean), optional(call.running_var),
                                         optional(mean), optional(invstd), call.eps, call.reserve);
  }
  return at::native_batch_norm_backward(dy, x, optional(weight), optional(call.running_mean),
                                        optional(call.running_var), optional(mean), optional(invstd), /*train=*/true,
                                        call.eps, call.mask);
}

/// Batch normalisation's backward as a node with the double backward above.
struct BatchNormBackward : torch::autograd::Function<BatchNormBackward> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context, const at::Tensor& dy,
                                                const at::Tensor& x, const std::optional<at::Tensor>& weight,
                                                const at::Tensor& mean, const at::Tensor& invstd,
                                                const BatchNormCall& call) {
    const at::Tensor w = weight.value_or(at::Tensor());
    context->save_for_backward({dy, x, w, mean, invstd});
    context->set_materialize_grads(false);
    context->saved_data["mask"] = pack(call.mask);
    auto [d_x, d_weight, d_bias] = stock_batch_norm_backward(dy, x, w, mean, invstd, call);
    return gather(call.mask, {d_x, d_weight, d_bias});
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list upstream) {
    const auto saved = context->get_saved_variables();
    const OutputMask mask = unpack(context->saved_data["mask"]);
    const auto [v, a, b] = spread(mask, std::move(upstream));
    const BatchNormInputs in{saved[0], saved[1], saved[2], saved[3], saved[4], v, a, b};
    const std::array<bool, 3> needs{context->needs_input_grad(0), context->needs_input_grad(1),
                                    in.weight.defined() && context->needs_input_grad(2)};
    if (!v.defined() && !a.defined() && !b.defined()) {
      return {{}, {}, {}, {}, {}, {}};
    }
    const BatchNormResults out = batch_norm_double_backward(in, needs);
    return {out.d_dy, out.d_x, out.d_weight, {}, {}, {}};
  }
};

inline ThreeTensors record_batch_norm_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                               const at::Tensor& mean, const at::Tensor& invstd,
                                               const BatchNormCall& call) {
  return spread(call.mask, BatchNormBackward::apply(dy, x, optional(weight), mean, invstd, call));
}

/// Whether the shapes and types are those that the formulas were written for.
inline bool can_fuse_batch_norm(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight,
                                const at::Tensor& mean, const at::Tensor& invstd) {
  return x.dim() >= 2 && x.numel() > 0 && mean.defined() && invstd.defined() && mean.numel() == x.size(1) &&
         invstd.numel() == x.size(1) && should_fuse({dy, x, weight}) && mean.scalar_type() == x.scalar_type() &&
         invstd.scalar_type() == x.scalar_type();
}

inline ThreeTensors native_batch_norm_backward_kernel(const at::Tensor& dy, const at::Tensor& x,
                                                      const std::optional<at::Tensor>& weight,
                                                      const std::optional<at::Tensor>& running_mean,
                                                      const std::optional<at::Tensor>& running_var,
                                                      const std::optional<at::Tensor>& save_mean,
                                                      const std::optional<at::Tensor>& save_invstd, bool train,
                                                      double eps, OutputMask mask) {
  const StockKernels stock;
  const at::Tensor w = weight.value_or(at::Tensor());
  const at::Tensor mean = save_mean.value_or(at::Tensor());
  const at::Tensor invstd = save_invstd.value_or(at::Tensor());
  if (!train || !(mask[0] || mask[1] || mask[2]) || !can_fuse_batch_norm(dy, x, w, mean, invstd)) {
    return at::native_batch_norm_backward(dy, x, weight, running_mean, running_var, save_mean, save_invstd, train, eps,
                                          mask);
  }
  return record_batch_norm_backward(
      dy, x, w, mean, invstd,
      {running_mean.value_or(at::Tensor()), running_var.value_or(at::Tensor()), eps, mask, at::Tensor()});
}

inline ThreeTensors cudnn_batch_norm_backward_kernel(
    const at::Tensor& x, const at::Tensor& dy, const at::Tensor& weight, const std::optional<at::Tensor>& running_mean,
    const std::optional<at::Tensor>& running_var, const std::optional<at::Tensor>& save_mean,
    const std::optional<at::Tensor>& save_var, double eps, const at::Tensor& reserve) {
  const StockKernels stock;
  const at::Tensor mean = save_mean.value_or(at::Tensor());
  const at::Tensor invstd = save_var.value_or(at::Tensor());  // cuDNN keeps 1/sqrt(var + eps) under this name.
  if (!can_fuse_batch_norm(dy, x, weight, mean, invstd)) {
    return at::cudnn_batch_norm_backward(x, dy, weight, running_mean, running_var, save_mean, save_var, eps, reserve);
  }
  return record_batch_norm_backward(
      dy, x, weight, mean, invstd,
      {running_mean.value_or(at::Tensor()), running_var.value_or(at::Tensor()), eps, {true, true, true}, reserve});
}

}  // namespace microreg::detail
