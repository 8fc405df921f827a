/// @file
/// The double backward of batch, layer and group normalisation: one formula, and its form on any device.
#pragma once

#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>
#include <ATen/core/grad_mode.h>
#include <microreg/fused/rule.hpp>

#include <array>
#include <cstdint>
#include <vector>

namespace microreg::detail {

/// Sums over the m elements that are normalised together; x_c = x - mean, h = weight dy, q = a dy.
template <class Number>
struct NormSums {
  Number v, vx, h, hx, vh, q, qx;
};

/// What the results have in common within a row: with A = r weight, B = r (a - weight v1), they are
///
///     d_dy = A v + B x_c + (b - A v0)        d_x = B dy + c v + d x_c + e
///
/// and p(v) = v - v0 - v1 x_c is v without its mean and its part along x.
template <class Number>
struct NormRow {
  Number r, v0, v1, c, d, e;
};

/// The formula. Normalisation's backward read dy, x, weight; v, a, b came in for its results d_x, d_weight, d_bias.
/// With xh = x_c r, r = 1/sqrt(var + eps), p(z) = z - mean(z) - xh mean(z xh):
///
///     cov  = mean(v h) - mean(v) mean(h) - mean(v xh) mean(h xh)
///     d_dy = weight r p(v) + a xh + b            d_weight = sum of dy r p(v)
///     d_x  = r [ p(q) - r mean(v xh) p(h) - r mean(h xh) p(v) - r cov xh ]
template <class Number>
NormRow<Number> norm_row(const NormSums<Number>& sums, double m, const Number& r) {
  const Number v = sums.v / m, v_xh = sums.vx * r / m;
  const Number h = sums.h / m, h_xh = sums.hx * r / m;
  const Number q = sums.q / m, q_xh = sums.qx * r / m;
  const Number cov = sums.vh / m - v * h - v_xh * h_xh;
  return {r,
          v,
          r * v_xh,
          -(r * r * h_xh),
          r * r * (2.0 * r * v_xh * h_xh - q_xh - r * cov),
          r * r * (v_xh * h + h_xh * v) - r * q};
}

/// A, B and the constant of d_dy.
template <class Number>
struct NormAffine {
  Number a, b, constant;

  NormAffine(const NormRow<Number>& row, const Number& weight, const Number& a_in, const Number& b_in)
      : a(row.r * weight), b(row.r * (a_in - weight * row.v1)), constant(b_in - a * row.v0) {}
};

/// One call, in a shape that its parts broadcast to. Each of weight, v, a, b may be undefined: 1, 0, 0, 0.
struct NormProblem {
  at::Tensor dy, x, weight, mean, rstd, v, a, b;
  /// The dimensions that are normalised over: those with the same weight, and those along which it varies.
  std::vector<std::int64_t> alike, varying;

  [[nodiscard]] double count() const { return static_cast<double>(x.numel()) / static_cast<double>(rstd.numel()); }

  /// Mean and 1/sqrt(var + eps) as functions of x. The values are those that the forward pass saved, of which `rstd`
  /// tells eps. A third derivative needs them: LibTorch's own takes the saved ones for constants, and is wrong without
  /// a word.
  void differentiate_statistics() {
    std::vector<std::int64_t> dims = alike;
    dims.insert(dims.end(), varying.begin(), varying.end());
    const at::Tensor var = x.var(dims, /*unbiased=*/false, /*keepdim=*/true);
    rstd = (var + (rstd.pow(-2) - var).detach()).rsqrt();
    mean = x.mean(dims, /*keepdim=*/true);
  }
};

/// d_dy, d_x, d_weight, in the shapes of x, x, weight, by ATen's operations: on any device, and differentiable. On CUDA
/// and without a graph, batch normalisation's sums come from the reduction that SyncBatchNorm uses. Sums and what
/// follows from them are of float64, in which differences of large ones keep their digits.
inline std::array<at::Tensor, 3> norm_double_backward_aten(NormProblem p, OutputMask needs) {
  const bool graph = at::GradMode::is_enabled();
  if (graph) {
    p.differentiate_statistics();
  }
  const auto or_constant = [&](const at::Tensor& tensor, double value) {
    return tensor.defined() ? tensor : at::full({}, value, p.x.options());
  };
  const at::Tensor weight = or_constant(p.weight, 1), a = or_constant(p.a, 0), b = or_constant(p.b, 0);
  const at::Tensor v = p.v.defined() ? p.v : at::zeros_like(p.x);
  const at::Tensor x_c = p.x - p.mean;
  const auto sum = [](const at::Tensor& z, at::IntArrayRef dims) {
    return dims.empty() ? z : z.sum(dims, /*keepdim=*/true, at::kDouble);
  };
  const auto alike = [&](const at::Tensor& z) { return sum(z, p.alike); };
  const auto all = [&](const at::Tensor& z) { return sum(z, p.varying).to(at::kDouble); };
  // {sum z, sum z x_c} over elements of the same weight.
  const auto moments = [&](const at::Tensor& z) -> std::array<at::Tensor, 2> {
    if (p.x.is_cuda() && !graph && p.varying.empty()) {
      const auto sums = at::batch_norm_backward_reduce(z.contiguous(p.x.suggest_memory_format()), p.x, p.mean.flatten(),
                                                       p.rstd.flatten(), {}, /*input_g=*/true, false, false);
      return {std::get<0>(sums).view_as(p.mean), std::get<1>(sums).view_as(p.mean)};
    }
    return {alike(z), alike(z * x_c)};
  };
  const auto [sum_v, sum_vx] = moments(v);
  const auto [sum_dy, sum_dyx] = moments(p.dy);
  const at::Tensor sum_vdy = alike(v * p.dy);
  const NormRow<at::Tensor> row =
      norm_row<at::Tensor>({all(sum_v), all(sum_vx), all(weight * sum_dy), all(weight * sum_dyx), all(weight * sum_vdy),
                            all(a * sum_dy), all(a * sum_dyx)},
                           p.count(), p.rstd.to(at::kDouble));
  const auto rounded = [&](const at::Tensor& t) { return t.to(p.x.scalar_type()); };
  const NormRow<at::Tensor> single{rounded(row.r), rounded(row.v0), rounded(row.v1),
                                   rounded(row.c), rounded(row.d),  rounded(row.e)};
  const NormAffine<at::Tensor> k(single, weight, a, b);
  std::array<at::Tensor, 3> out;
  if (needs[0]) {
    out[0] = at::addcmul(k.constant, x_c, k.b).addcmul_(v, k.a);
  }
  if (needs[1]) {
    out[1] = at::addcmul(single.e, p.dy, k.b).addcmul_(v, single.c).addcmul_(x_c, single.d);
  }
  if (needs[2]) {
    const NormRow<at::Tensor>& of = p.alike.empty() ? single : row;  // no whole tensors of float64
    out[2] = rounded(at::sum_to(of.r * (sum_vdy - of.v0 * sum_dy - of.v1 * sum_dyx), weight.sizes()));
  }
  return out;
}

}  // namespace microreg::detail
