/// @file
/// Norms and losses that LibTorch differentiates as a whole, composed of operations that have gates.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/Reduction.h>
#include <microreg/detail/finite.hpp>
#include <microreg/detail/tensors.hpp>
#include <microreg/gates/kinked_operation.hpp>

#include <cstdint>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail::gating {

inline double order_of(const Arguments& in) {
  for (const char* name : {"p", "ord"}) {
    if (const auto i = in.find(name)) {
      return in.given(*i) ? in.number(*i) : 2;
    }
  }
  return 2;
}

inline bool has_kink_of_order(const Arguments& in) {
  const double order = order_of(in);
  return order == 0 || order == 1 || !is_finite(order);
}

inline at::Tensor norm_of_order(const at::Tensor& self, double order, at::IntArrayRef dim, bool keepdim) {
  if (order == 0) {
    return self.ne(0).to(self.scalar_type()).sum(dim, keepdim);
  }
  const at::Tensor absolute = self.abs();
  return order == 1  ? absolute.sum(dim, keepdim)
         : order > 0 ? absolute.amax(dim, keepdim)
                     : absolute.amin(dim, keepdim);
}

inline Tensors composed_norm(const Arguments& in, const GateTensors& /*gates*/) {
  const auto dim = in.find("dim");
  const auto keepdim = in.find("keepdim");
  const auto type = in.find("dtype");
  const at::Tensor self = type && in.given(*type) ? in.tensor(0).to(in.values()[*type].toScalarType()) : in.tensor(0);
  return {norm_of_order(self, order_of(in), dim && in.given(*dim) ? in.integers(*dim) : std::vector<std::int64_t>{},
                        keepdim && in.flag(*keepdim))};
}

inline at::Tensor reduced(const at::Tensor& loss, std::int64_t reduction) {
  return reduction == at::Reduction::Mean ? loss.mean() : reduction == at::Reduction::Sum ? loss.sum() : loss;
}

/// Parabola within `width` around zero, `absolute_slope` times a line beyond.
inline Tensors composed_smooth_l1(const Arguments& in, double width, double curvature) {
  const at::Tensor difference = in.tensor(0) - in.tensor(1);
  const at::Tensor absolute = difference.abs();
  if (width == 0) {
    return {reduced(absolute, in.integer(2))};
  }
  const at::Tensor parabola = difference * difference * (curvature / 2);
  const at::Tensor lines = (absolute - width / 2) * (curvature * width);
  return {reduced(at::where(absolute.lt(width), parabola, lines), in.integer(2))};
}

inline Tensors composed_multi_margin(const Arguments& in, const GateTensors& /*gates*/) {
  const at::Tensor& self = in.tensor(0);
  const at::Tensor rows = self.dim() < 2 ? self.unsqueeze(0) : self;
  const at::Tensor target = in.tensor(1).reshape({-1, 1});
  at::Tensor margins = (rows - rows.gather(1, target) + in.scalar(3)).relu();
  margins = in.integer(2) == 2 ? margins * margins : margins;
  margins =
      margins.masked_fill(at::zeros(margins.sizes(), rows.options().dtype(at::kBool)).scatter(1, target, true), 0);
  if (in.given(4)) {
    margins = margins * in.tensor(4).index_select(0, target.flatten()).unsqueeze(1);
  }
  return {reduced(margins.mean(1).reshape(in.tensor(1).sizes()), in.integer(5))};
}

inline Tensors composed_multilabel_margin(const Arguments& in, const GateTensors& /*gates*/) {
  const at::Tensor& self = in.tensor(0);
  const at::Tensor counts = in.tensor(1).ge(0).to(at::kLong).cumprod(-1);  // up to the first label of -1
  const at::Tensor target = in.tensor(1).clamp_min(0);
  const at::Tensor is_target = at::zeros_like(target).scatter_add(-1, target, counts).gt(0);
  const at::Tensor margins = (self.unsqueeze(-2) - self.gather(-1, target).unsqueeze(-1) + 1).relu();
  const at::Tensor counted = counts.unsqueeze(-1) * is_target.logical_not().unsqueeze(-2);
  const at::Tensor loss = (margins * counted).sum({-2, -1}) / self.size(-1);
  return {reduced(loss, in.integer(2)), is_target.to(self.scalar_type())};
}

inline constexpr KinkedOperation losses[] = {
    composed("norm.Scalar", "Tensor self, Scalar p", composed_norm, has_kink_of_order),
    composed("norm.ScalarOpt_dtype", "Tensor self, Scalar? p, int dtype", composed_norm, has_kink_of_order),
    composed("norm.ScalarOpt_dim", "Tensor self, Scalar? p, int[] dim, bool keepdim", composed_norm, has_kink_of_order),
    composed("norm.ScalarOpt_dim_dtype", "Tensor self, Scalar? p, int[] dim, bool keepdim, int dtype", composed_norm,
             has_kink_of_order),
    composed("linalg_vector_norm", "Tensor self, Scalar ord, int[]? dim, bool keepdim, int? dtype", composed_norm,
             has_kink_of_order),
    composed(
        "dist", "Tensor self, Tensor other, Scalar p",
        [](const Arguments& in, const GateTensors&) {
          return Tensors{norm_of_order(in.tensor(0) - in.tensor(1), order_of(in), {}, false)};
        },
        has_kink_of_order),
    composed(
        "_cdist_forward", "Tensor x1, Tensor x2, float p, int? compute_mode",
        [](const Arguments& in, const GateTensors&) {
          return Tensors{
              norm_of_order(in.tensor(0).unsqueeze(-2) - in.tensor(1).unsqueeze(-3), order_of(in), {-1}, false)};
        },
        has_kink_of_order),
    composed(
        "_pdist_forward", "Tensor self, float p",
        [](const Arguments& in, const GateTensors&) {
          const at::Tensor& self = in.tensor(0);
          const at::Tensor pairs =
              at::triu_indices(self.size(0), self.size(0), 1, at::kLong, at::kStrided, self.device(), false);
          return Tensors{norm_of_order(self.index_select(0, pairs[0]) - self.index_select(0, pairs[1]), order_of(in),
                                       {-1}, false)};
        },
        has_kink_of_order),
    composed(
        "smooth_l1_loss", "Tensor self, Tensor target, int reduction, float beta",
        [](const Arguments& in, const GateTensors&) { return composed_smooth_l1(in, in.number(3), 1 / in.number(3)); }),
    composed("huber_loss", "Tensor self, Tensor target, int reduction, float delta",
             [](const Arguments& in, const GateTensors&) { return composed_smooth_l1(in, in.number(3), 1); }),
    composed("multi_margin_loss", "Tensor self, Tensor target, Scalar p, Scalar margin, Tensor? weight, int reduction",
             composed_multi_margin),
    composed("multilabel_margin_loss_forward", "Tensor self, Tensor target, int reduction -> Tensor, Tensor",
             composed_multilabel_margin),
};

}  // namespace microreg::inline MICROREG_ABI::detail::gating
