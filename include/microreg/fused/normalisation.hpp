/// @file
/// The double backward of batch, layer and group normalisation: one formula, and its form on any device.
#pragma once

#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>
#include <ATen/core/grad_mode.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/vector_kernels.hpp>
#include <microreg/fused/rule.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// Over the elements that are normalised together; x_c = x - mean, h = weight dy, q = a dy. Sums, or, divided by the
/// number of elements and with xh = x_c r in place of x_c, means.
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

/// sum + factor x y: in one sweep where they are tensors.
inline double plus_product(double sum, double x, double y, double factor = 1) { return sum + factor * (x * y); }
inline at::Tensor plus_product(const at::Tensor& sum, const at::Tensor& x, const at::Tensor& y, double factor = 1) {
  return at::addcmul(sum, x, y, factor);
}

/// The formula. Normalisation's backward read dy, x, weight; v, a, b came in for its results d_x, d_weight, d_bias.
/// With r = 1/sqrt(var + eps), p(z) = z - mean(z) - xh mean(z xh):
///
///     cov  = mean(v h) - mean(v) mean(h) - mean(v xh) mean(h xh)
///     d_dy = weight r p(v) + a xh + b            d_weight = sum of dy r p(v)
///     d_x  = r [ p(q) - r mean(v xh) p(h) - r mean(h xh) p(v) - r cov xh ]
template <class Number>
NormRow<Number> norm_row(const NormSums<Number>& mean, const Number& r) {
  const Number cov = plus_product(plus_product(mean.vh, mean.v, mean.h, -1), mean.vx, mean.hx, -1);
  const Number v1 = r * mean.vx;
  const Number minus_r2 = -(r * r);
  const Number along = plus_product(plus_product(mean.qx, r, cov), v1, mean.hx, -2);
  const Number crossed = plus_product(mean.vx * mean.h, mean.hx, mean.v);
  return {r, mean.v, v1, minus_r2 * mean.hx, minus_r2 * along, r * (r * crossed - mean.q)};
}

/// The same from sums over m elements.
template <class Number>
NormRow<Number> norm_row(const NormSums<Number>& sum, double m, const Number& r) {
  const Number k = r / m;
  return norm_row<Number>({sum.v / m, sum.vx * k, sum.h / m, sum.hx * k, sum.vh / m, sum.q / m, sum.qx * k}, r);
}

/// A, B and the constant of d_dy.
template <class Number>
struct NormAffine {
  Number a, b, constant;

  NormAffine(const NormRow<Number>& row, const Number& weight, const Number& a_in, const Number& b_in)
      : a(row.r * weight),
        b(row.r * plus_product(a_in, weight, row.v1, -1)),
        constant(plus_product(b_in, a, row.v0, -1)) {}
};

/// What elements of one weight give to the derivative by it, from their sums of dy, dy x_c and v dy.
template <class Number>
Number norm_weight_gradient(const NormRow<Number>& row, const Number& dy, const Number& dyx, const Number& vdy) {
  return row.r * plus_product(plus_product(vdy, row.v0, dy, -1), row.v1, dyx, -1);
}

/// Whether float32 is too coarse for what each element of `rstd` normalises of x. Of few elements little is left
/// without their mean and their part along x (of two, a share of eps / (var + eps)): a difference of nearly equal
/// numbers.
inline bool is_coarse_over(const at::Tensor& x, const at::Tensor& rstd) {
  return wide_type(x.scalar_type()) == at::kFloat && x.numel() > rstd.numel() && x.numel() <= 16 * rstd.numel();
}

/// The results of a formula in the type of the call.
template <class Results>
Results rounded_to(at::ScalarType type, Results results) {
  for (at::Tensor& result : results) {
    result = result.defined() ? result.to(type) : result;
  }
  return results;
}

/// One call, in a shape that its parts broadcast to. Each of weight, v, a, b may be undefined: 1, 0, 0, 0.
struct NormProblem {
  at::Tensor dy, x, weight, mean, rstd, v, a, b;
  /// The dimensions that are normalised over: those with the same weight, and those along which it varies.
  std::vector<std::int64_t> alike, varying;

  [[nodiscard]] double count() const { return static_cast<double>(x.numel()) / static_cast<double>(rstd.numel()); }
  /// Whether the CPU's kernels are to be run.
  [[nodiscard]] bool runs_on_kernels() const { return count() > 1 && runs_kernels(x); }
  [[nodiscard]] bool is_coarse() const { return is_coarse_over(x, rstd); }

  /// Without half types, but for bfloat16 that the kernels read as it lies.
  [[nodiscard]] NormProblem widened() const {
    NormProblem wide = *this;
    widen_unless_read(false, {&wide.weight, &wide.mean, &wide.rstd, &wide.a, &wide.b});
    widen_unless_read(runs_on_kernels() && !is_coarse(), {&wide.dy, &wide.x, &wide.v});
    return wide;
  }

  /// The same in float64, whose mean is that of x to the last digit. rstd stays the one that the backward pass read.
  [[nodiscard]] NormProblem in_float64() const {
    NormProblem wide = *this;
    for (at::Tensor* const tensor : {&wide.dy, &wide.x, &wide.weight, &wide.rstd, &wide.v, &wide.a, &wide.b}) {
      *tensor = tensor->defined() ? tensor->to(at::kDouble) : *tensor;
    }
    wide.mean = wide.x.mean(dims(), /*keepdim=*/true);
    return wide;
  }

  /// Mean and 1/sqrt(var + eps) of x in float64, as constants.
  [[nodiscard]] std::pair<at::Tensor, at::Tensor> exact_statistics(double eps) const {
    const at::Tensor wide = x.detach().to(at::kDouble);
    const at::Tensor centre = wide.mean(dims(), /*keepdim=*/true);
    return {centre, ((wide - centre).square().mean(dims(), /*keepdim=*/true) + eps).rsqrt()};
  }

  /// Mean and 1/sqrt(var + eps) as functions of x. The values are those that the forward pass saved, of which `rstd`
  /// tells eps. A third derivative needs them: LibTorch's own takes the saved ones for constants, and is wrong without
  /// a word.
  void differentiate_statistics() {
    const at::Tensor var = x.var(dims(), /*unbiased=*/false, /*keepdim=*/true);
    rstd = (var + (rstd.pow(-2) - var).detach()).rsqrt();
    mean = x.mean(dims(), /*keepdim=*/true);
  }

  /// All dimensions that are normalised over.
  [[nodiscard]] std::vector<std::int64_t> dims() const {
    std::vector<std::int64_t> all = alike;
    all.insert(all.end(), varying.begin(), varying.end());
    return all;
  }
};

/// The five sums over elements of the same weight: of v, v x_c, dy, dy x_c, v dy. On CUDA and without a graph, batch
/// normalisation's come from the reduction that SyncBatchNorm uses; the others are of float64, in which differences of
/// large sums keep their digits.
inline std::array<at::Tensor, 5> norm_moments(const NormProblem& p, const at::Tensor& v, const at::Tensor& x_c) {
  const auto sum = [&](const at::Tensor& z) {
    return p.alike.empty() ? z : z.sum(p.alike, /*keepdim=*/true, at::kDouble);
  };
  const auto pair = [&](const at::Tensor& z) -> std::array<at::Tensor, 2> {
    if (p.x.is_cuda() && !at::GradMode::is_enabled() && p.varying.empty()) {
      const auto sums = at::batch_norm_backward_reduce(z.contiguous(p.x.suggest_memory_format()), p.x, p.mean.flatten(),
                                                       p.rstd.flatten(), {}, /*input_g=*/true, false, false);
      return {std::get<0>(sums).view_as(p.mean), std::get<1>(sums).view_as(p.mean)};
    }
    return {sum(z), sum(z * x_c)};
  };
  const auto [sum_v, sum_vx] = pair(v);
  const auto [sum_dy, sum_dyx] = pair(p.dy);
  return {sum_v, sum_vx, sum_dy, sum_dyx, sum(v * p.dy)};
}

/// Such sums as one tensor of float64, about the mean itself. `off`: that minus the saved one, which was rounded; all
/// there is of an error where x is large against its standard deviation.
inline at::Tensor centred_moments(const std::array<at::Tensor, 5>& moments, const at::Tensor& off) {
  const at::Tensor four = at::stack({moments[0], moments[1], moments[2], moments[3]}).to(at::kDouble);
  four.slice(0, 1, 4, 2).addcmul_(four.slice(0, 0, 3, 2), off, -1);
  return at::cat({four, moments[4].to(at::kDouble).unsqueeze(0)});
}

/// The row of few sums, many kinds at a time: a device waits for each small operation longer than it works.
inline NormRow<at::Tensor> norm_row_together(const NormProblem& p, const at::Tensor& moments, const at::Tensor& weight,
                                             const at::Tensor& a, const at::Tensor& r) {
  at::Tensor all = at::cat({moments.narrow(0, 0, 2), moments.narrow(0, 2, 3) * weight, moments.narrow(0, 2, 2) * a});
  if (!p.varying.empty()) {
    std::vector<std::int64_t> dims;
    for (const std::int64_t dim : p.varying) {
      dims.push_back(dim + 1);  // behind the stack's own
    }
    all = all.sum(dims, /*keepdim=*/true);
  }
  all.div_(p.count());
  all.slice(0, 1, 4, 2).mul_(r);
  all.select(0, 6).mul_(r);
  return norm_row<at::Tensor>({all.select(0, 0), all.select(0, 1), all.select(0, 2), all.select(0, 3), all.select(0, 4),
                               all.select(0, 5), all.select(0, 6)},
                              r);
}

/// Over one element. What is normalised is 0 then, whatever x is; by the formula, differences of equal numbers times
/// r = 1/sqrt(eps) would be left.
inline std::array<at::Tensor, 3> norm_double_backward_of_one(const NormProblem& p) {
  const at::Tensor zeros = at::zeros_like(p.x);
  return {p.b.defined() ? zeros + p.b : zeros, zeros, p.weight.defined() ? at::zeros_like(p.weight) : at::Tensor()};
}

/// d_dy, d_x, d_weight, in the shapes of x, x, weight, by ATen's operations: on any device, and differentiable.
inline std::array<at::Tensor, 3> norm_double_backward_aten(NormProblem p, OutputMask needs) {
  if (p.count() == 1) {
    return norm_double_backward_of_one(p);
  }
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
  const at::Tensor r = p.rstd.to(at::kDouble);
  std::array<at::Tensor, 5> moments = norm_moments(p, v, x_c);
  const bool together = !graph && !p.alike.empty();
  at::Tensor off, sums;
  if (together) {
    off = x_c.sum(p.dims(), /*keepdim=*/true, at::kDouble).div_(p.count());
    sums = centred_moments(moments, off);
    for (std::size_t i = 0; i < moments.size(); ++i) {
      moments[i] = sums.select(0, static_cast<std::int64_t>(i));
    }
  }
  const auto& [sum_v, sum_vx, sum_dy, sum_dyx, sum_vdy] = moments;
  const auto row = [&]() -> NormRow<at::Tensor> {
    if (together) {
      return norm_row_together(p, sums, weight, a, r);
    }
    const auto all = [&](const at::Tensor& z) {
      return p.varying.empty() ? z.to(at::kDouble) : z.sum(p.varying, /*keepdim=*/true, at::kDouble);
    };
    return norm_row<at::Tensor>({all(sum_v), all(sum_vx), all(weight * sum_dy), all(weight * sum_dyx),
                                 all(weight * sum_vdy), all(a * sum_dy), all(a * sum_dyx)},
                                p.count(), r);
  }();
  const auto rounded = [&](const at::Tensor& t) { return t.to(p.x.scalar_type()); };
  // Coefficients are of float64, unless they are as large as x.
  const auto fine = [&](const at::Tensor& t) { return t.to(p.alike.empty() ? p.x.scalar_type() : at::kDouble); };
  NormRow<at::Tensor> of_row{fine(row.r), fine(row.v0), fine(row.v1), fine(row.c), fine(row.d), fine(row.e)};
  NormAffine<at::Tensor> affine(of_row, fine(weight), fine(a), fine(b));
  if (together) {  // x_c is about the rounded mean
    affine.constant = plus_product(affine.constant, affine.b, off, -1);
    of_row.e = plus_product(of_row.e, of_row.d, off, -1);
  }
  std::vector<at::Tensor> k{affine.a, affine.b, affine.constant, of_row.c, of_row.d, of_row.e};
  if (p.varying.empty()) {  // all of one shape: together
    k = rounded(at::stack(k)).unbind();
  } else {
    std::transform(k.begin(), k.end(), k.begin(), rounded);
  }
  std::array<at::Tensor, 3> out;
  if (needs[0]) {
    out[0] = at::addcmul(k[2], x_c, k[1]).addcmul_(v, k[0]);
  }
  if (needs[1]) {
    out[1] = at::addcmul(k[5], p.dy, k[1]).addcmul_(v, k[3]).addcmul_(x_c, k[4]);
  }
  if (needs[2]) {
    const at::Tensor each = norm_weight_gradient(of_row, fine(sum_dy), fine(sum_dyx), fine(sum_vdy));
    out[2] = rounded(at::sum_to(each, weight.sizes()));
  }
  return out;
}

/// The same by `kernels(p, zero of p's type)` where they are to be run.
template <class Kernels>
std::array<at::Tensor, 3> norm_double_backward(const NormProblem& given, OutputMask needs, const Kernels& kernels) {
  const NormProblem p = given.widened();
  if (p.is_coarse()) {
    return rounded_to(p.x.scalar_type(), norm_double_backward(p.in_float64(), needs, kernels));
  }
  if (!p.runs_on_kernels()) {
    return norm_double_backward_aten(p, needs);
  }
  std::array<at::Tensor, 3> results;
  with_type(p.x.scalar_type(), [&](auto zero) { results = kernels(p, zero); });
  return results;
}

}  // namespace microreg::inline MICROREG_ABI::detail
