/// @file
/// Double backward of layer and group normalisation on the CPU: a row is read twice, the second time from the cache.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <microreg/detail/vector_kernels.hpp>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace microreg::detail {

/// Pointers and sizes of one call; v, weight, a, b and the outputs may be null.
template <class T>
struct LayerNormProblem {
  const T* x;
  const T* dy;
  const T* v;
  const T* mean;
  const T* rstd;
  const T* weight;
  const T* a;
  const T* b;
  T* d_dy;
  T* d_x;
  std::int64_t rows;
  std::int64_t groups;  ///< row n has row n % groups of weight, a and b
  std::int64_t length;  ///< elements of a row, over which is normalised
};

/// Rows [begin, end). With xh = (x - mean) r, h = w dy, q = a dy, p(z) = z - mean(z) - xh mean(z xh), m = length:
///
///     cov  = sum(v h) - m mean(v) mean(h) - m mean(v xh) mean(h xh)
///     d_dy = w r p(v) + a xh + b            d_w = sum over rows of dy r p(v)
///     d_x  = r [ p(q) - r mean(v xh) p(h) - r mean(h xh) p(v) ] - (r r cov / m) xh
///
/// `d_weight`, if not null, gets the sums over these rows in float64; a row for each group, as in `pending`.
template <class T>
struct LayerNormRows {
  using V = typename Lanes<T>::type;
  static constexpr std::int64_t width = Lanes<T>::count;
  static constexpr std::int64_t flush = 64;

  struct Row {
    V w, a, x, dy, v;
  };

  static MICROREG_ALWAYS_INLINE void load_at(const LayerNormProblem<T>& p, std::int64_t at, std::int64_t affine, T mean,
                                             T r, Row& row) {
    const V zero{};
    load(row.x, p.x + at);
    load(row.dy, p.dy + at);
    row.x = (row.x - mean) * r;
    row.v = zero;
    row.a = zero;
    row.w = zero + T{1};
    if (p.v != nullptr) {
      load(row.v, p.v + at);
    }
    if (p.weight != nullptr) {
      load(row.w, p.weight + affine);
    }
    if (p.a != nullptr) {
      load(row.a, p.a + affine);
    }
  }

  static MICROREG_ALWAYS_INLINE double total(const V& lanes) {
    double sum = 0;
    for (std::int64_t lane = 0; lane < width; ++lane) {
      sum += static_cast<double>(lanes[lane]);
    }
    return sum;
  }

  static MICROREG_ALWAYS_INLINE void run(const LayerNormProblem<T>& p, std::int64_t begin, std::int64_t end,
                                         double* d_weight, T* pending) {
    const std::int64_t length = p.length;
    const double m = static_cast<double>(length);
    for (std::int64_t n = begin; n < end; ++n) {
      const std::int64_t offset = n * length;
      const std::int64_t affine = n % p.groups * length;
      const T mean = p.mean[n];
      const T r = p.rstd[n];
      V sv{}, svx{}, sh{}, shx{}, svh{}, sq{}, sqx{};
      Row row;
      std::int64_t i = 0;
      for (; i + width <= length; i += width) {
        load_at(p, offset + i, affine + i, mean, r, row);
        const V h = row.w * row.dy;
        const V q = row.a * row.dy;
        sv += row.v;
        svx += row.v * row.x;
        sh += h;
        shx += h * row.x;
        svh += row.v * h;
        sq += q;
        sqx += q * row.x;
      }
      double tv = total(sv), tvx = total(svx), th = total(sh), thx = total(shx), tvh = total(svh), tq = total(sq),
             tqx = total(sqx);
      for (; i < length; ++i) {
        const double x = static_cast<double>((p.x[offset + i] - mean) * r);
        const double dy = static_cast<double>(p.dy[offset + i]);
        const double v = p.v != nullptr ? static_cast<double>(p.v[offset + i]) : 0.0;
        const double h = p.weight != nullptr ? static_cast<double>(p.weight[affine + i]) * dy : dy;
        const double q = p.a != nullptr ? static_cast<double>(p.a[affine + i]) * dy : 0.0;
        tv += v, tvx += v * x, th += h, thx += h * x, tvh += v * h, tq += q, tqx += q * x;
      }
      const double rd = static_cast<double>(r);
      const double mv = tv / m, mvx = tvx / m, mh = th / m, mhx = thx / m, mq = tq / m, mqx = tqx / m;
      const double cov = tvh - m * mv * mh - m * mvx * mhx;
      // p(v) = v - v0 - v1 xh, and d_x = r q + xh_ xh + h_ h + v_ v + constant.
      const T v0 = static_cast<T>(mv), v1 = static_cast<T>(mvx);
      const T h_ = static_cast<T>(-rd * rd * mvx), v_ = static_cast<T>(-rd * rd * mhx);
      const T xh_ = static_cast<T>(rd * (2 * rd * mvx * mhx - mqx) - rd * rd * cov / m);
      const T constant = static_cast<T>(rd * (rd * mvx * mh + rd * mhx * mv - mq));
      for (i = 0; i + width <= length; i += width) {
        load_at(p, offset + i, affine + i, mean, r, row);
        const V pv = r * (row.v - v0 - v1 * row.x);
        if (p.d_dy != nullptr) {
          V result = row.w * pv + row.a * row.x;
          if (p.b != nullptr) {
            V b;
            load(b, p.b + affine + i);
            result += b;
          }
          store(p.d_dy + offset + i, result);
        }
        if (p.d_x != nullptr) {
          const V result = r * row.a * row.dy + xh_ * row.x + h_ * row.w * row.dy + v_ * row.v + constant;
          store(p.d_x + offset + i, result);
        }
        if (d_weight != nullptr) {
          V sum;
          load(sum, pending + affine + i);
          sum += row.dy * pv;
          store(pending + affine + i, sum);
        }
      }
      for (; i < length; ++i) {
        const T x = (p.x[offset + i] - mean) * r;
        const T dy = p.dy[offset + i];
        const T v = p.v != nullptr ? p.v[offset + i] : T{0};
        const T w = p.weight != nullptr ? p.weight[affine + i] : T{1};
        const T a = p.a != nullptr ? p.a[affine + i] : T{0};
        const T pv = r * (v - v0 - v1 * x);
        if (p.d_dy != nullptr) {
          p.d_dy[offset + i] = w * pv + a * x + (p.b != nullptr ? p.b[affine + i] : T{0});
        }
        if (p.d_x != nullptr) {
          p.d_x[offset + i] = r * a * dy + xh_ * x + h_ * w * dy + v_ * v + constant;
        }
        if (d_weight != nullptr) {
          pending[affine + i] += dy * pv;
        }
      }
      // A sum in `pending` grows once in `groups` rows.
      if (d_weight != nullptr && ((n + 1 - begin) % (flush * p.groups) == 0 || n + 1 == end)) {
        for (i = 0; i < length * p.groups; ++i) {
          d_weight[i] += static_cast<double>(pending[i]);
          pending[i] = T{0};
        }
      }
    }
  }
};

/// All rows; `d_weight` has `groups` times `length` elements, or is null.
template <class T>
void layer_norm_rows(const LayerNormProblem<T>& problem, T* d_weight) {
  constexpr std::int64_t grain_elements = 16384;
  const std::int64_t grain = std::max<std::int64_t>(1, grain_elements / problem.length);
  // A fixed cut into parts, so that the result depends on the number of threads alone.
  const std::int64_t parts =
      std::max<std::int64_t>(1, std::min<std::int64_t>(at::get_num_threads(), problem.rows / grain));
  const std::size_t weights = d_weight != nullptr ? static_cast<std::size_t>(problem.groups * problem.length) : 0;
  std::vector<std::vector<double>> sums(static_cast<std::size_t>(parts));
  at::parallel_for(0, parts, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = begin; part < end; ++part) {
      std::vector<double>& sum = sums[static_cast<std::size_t>(part)];
      sum.assign(weights, 0.0);
      std::vector<T> pending(sum.size(), T{0});
      run_widest<LayerNormRows<T>, const LayerNormProblem<T>&>(
          problem, problem.rows * part / parts, problem.rows * (part + 1) / parts,
          d_weight != nullptr ? sum.data() : nullptr, pending.data());
    }
  });
  for (std::size_t i = 0; i < weights; ++i) {
    double total = 0;
    for (const std::vector<double>& sum : sums) {
      total += sum[i];
    }
    d_weight[i] = static_cast<T>(total);
  }
}

}  // namespace microreg::detail
