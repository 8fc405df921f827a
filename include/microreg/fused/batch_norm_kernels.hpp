/// @file
/// Double backward of batch normalisation on the CPU: five sums a channel, then one sweep that writes both results.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <microreg/detail/vector_kernels.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace microreg::detail {

/// Sums over the m elements of a channel, x_c = x - mean. In lanes, or in float64 where `Number` is double.
template <class Number>
struct BatchNormSumsOf {
  Number v{}, vx{}, dy{}, dyx{}, vdy{};

  MICROREG_ALWAYS_INLINE void add(const Number& x_c, const Number& dy_i, const Number& v_i) {
    v += v_i;
    vx += v_i * x_c;
    dy += dy_i;
    dyx += dy_i * x_c;
    vdy += v_i * dy_i;
  }
};
using BatchNormSums = BatchNormSumsOf<double>;

/// The results are affine in what was read: d_dy = a1 v + a2 x_c + a3 and d_x = b1 dy + b2 v + b3 x_c + b4.
struct BatchNormCoefficients {
  double a1 = 0, a2 = 0, a3 = 0, b1 = 0, b2 = 0, b3 = 0, b4 = 0, d_weight = 0;
};

/// The formulas, per channel. With xh = x_c r, r = 1/sqrt(var + eps), p(z) = z - mean(z) - xh mean(z xh):
///
///     cov  = sum(v dy) - m mean(v) mean(dy) - m mean(v xh) mean(dy xh)
///     d_dy = w r p(v) + a xh + b            d_w = r cov
///     d_x  = r [ (a - w r mean(v xh)) p(dy) - w r mean(dy xh) p(v) ] - (w r r cov / m) xh
inline BatchNormCoefficients batch_norm_coefficients(const BatchNormSums& s, double m, double r, double w, double a,
                                                     double b) {
  const double mean_v = s.v / m;
  const double mean_vx = s.vx * r / m;
  const double mean_dy = s.dy / m;
  const double mean_dyx = s.dyx * r / m;
  const double cov = s.vdy - m * mean_v * mean_dy - m * mean_vx * mean_dyx;
  const double k1 = a - w * r * mean_vx;
  const double k2 = -w * r * mean_dyx;
  return {.a1 = w * r,
          .a2 = k1 * r,
          .a3 = b - w * r * mean_v,
          .b1 = r * k1,
          .b2 = r * k2,
          .b3 = r * (-r * (k1 * mean_dyx + k2 * mean_vx) - w * r * r * cov / m),
          .b4 = -r * (k1 * mean_dy + k2 * mean_v),
          .d_weight = r * cov};
}

/// Pointers and sizes of one call. v may be null (zero), and so may the outputs that are not wanted.
template <class T>
struct BatchNormProblem {
  const T* x;
  const T* dy;
  const T* v;
  const T* mean;
  const T* invstd;
  const T* weight;  ///< null: 1
  const T* a;       ///< null: 0
  const T* b;       ///< null: 0
  T* d_dy;
  T* d_x;
  T* d_weight;
  std::int64_t batch;
  std::int64_t channels;
  std::int64_t plane;  ///< elements of one channel of one sample, contiguous; 1 if channels are innermost

  [[nodiscard]] BatchNormCoefficients coefficients(const BatchNormSums& sums, std::int64_t c) const {
    return batch_norm_coefficients(sums, static_cast<double>(batch * plane), static_cast<double>(invstd[c]),
                                   weight != nullptr ? static_cast<double>(weight[c]) : 1.0,
                                   a != nullptr ? static_cast<double>(a[c]) : 0.0,
                                   b != nullptr ? static_cast<double>(b[c]) : 0.0);
  }
};

/// What is read at one place: x - mean, dy, v (zero if there is none).
template <class T>
struct BatchNormLanes {
  typename Lanes<T>::type x, dy, v{};

  /// `mean` is a number or lanes.
  template <class Mean>
  MICROREG_ALWAYS_INLINE BatchNormLanes(const BatchNormProblem<T>& p, std::int64_t at, const Mean& mean) {
    load(x, p.x + at);
    load(dy, p.dy + at);
    if (p.v != nullptr) {
      load(v, p.v + at);
    }
    x -= mean;
  }
};

/// The same for one element, as `Number`.
template <class T, class Number>
struct BatchNormElement {
  Number x, dy, v;

  MICROREG_ALWAYS_INLINE BatchNormElement(const BatchNormProblem<T>& p, std::int64_t at, T mean)
      : x(static_cast<Number>(p.x[at]) - static_cast<Number>(mean)),
        dy(static_cast<Number>(p.dy[at])),
        v(p.v != nullptr ? static_cast<Number>(p.v[at]) : Number{0}) {}
};

/// How many values a lane adds up in T before the sum moves on to float64: keeps float32 sums accurate for channels of
/// any length.
inline constexpr std::int64_t batch_norm_flush = 64;

/// Channels [begin, end) of a tensor whose channel planes are contiguous.
template <class T>
struct BatchNormPlanes {
  using V = typename Lanes<T>::type;
  static constexpr std::int64_t width = Lanes<T>::count;

  /// Moves the sums in lanes on to float64.
  static MICROREG_ALWAYS_INLINE void flush(BatchNormSumsOf<V>& lanes, BatchNormSums& total) {
    for (std::int64_t lane = 0; lane < width; ++lane) {
      total.v += static_cast<double>(lanes.v[lane]);
      total.vx += static_cast<double>(lanes.vx[lane]);
      total.dy += static_cast<double>(lanes.dy[lane]);
      total.dyx += static_cast<double>(lanes.dyx[lane]);
      total.vdy += static_cast<double>(lanes.vdy[lane]);
    }
    lanes = {};
  }

  static MICROREG_ALWAYS_INLINE BatchNormSums reduce(const BatchNormProblem<T>& p, std::int64_t c) {
    BatchNormSums total;
    BatchNormSumsOf<V> lanes;
    std::int64_t pending = 0;
    const T mean = p.mean[c];
    for (std::int64_t n = 0; n < p.batch; ++n) {
      const std::int64_t offset = (n * p.channels + c) * p.plane;
      std::int64_t i = 0;
      for (; i + width <= p.plane; i += width) {
        const BatchNormLanes<T> in(p, offset + i, mean);
        lanes.add(in.x, in.dy, in.v);
        if (++pending == batch_norm_flush) {
          pending = 0;
          flush(lanes, total);
        }
      }
      for (; i < p.plane; ++i) {
        const BatchNormElement<T, double> in(p, offset + i, mean);
        total.add(in.x, in.dy, in.v);
      }
    }
    flush(lanes, total);
    return total;
  }

  static MICROREG_ALWAYS_INLINE void sweep(const BatchNormProblem<T>& p, std::int64_t c,
                                           const BatchNormCoefficients& k) {
    const T mean = p.mean[c];
    const T a1 = static_cast<T>(k.a1), a2 = static_cast<T>(k.a2), a3 = static_cast<T>(k.a3);
    const T b1 = static_cast<T>(k.b1), b2 = static_cast<T>(k.b2), b3 = static_cast<T>(k.b3), b4 = static_cast<T>(k.b4);
    for (std::int64_t n = 0; n < p.batch; ++n) {
      const std::int64_t offset = (n * p.channels + c) * p.plane;
      std::int64_t i = 0;
      for (; i + width <= p.plane; i += width) {
        const BatchNormLanes<T> in(p, offset + i, mean);
        if (p.d_dy != nullptr) {
          const V result = a1 * in.v + (a2 * in.x + a3);
          store(p.d_dy + offset + i, result);
        }
        if (p.d_x != nullptr) {
          const V result = b1 * in.dy + (b2 * in.v + (b3 * in.x + b4));
          store(p.d_x + offset + i, result);
        }
      }
      for (; i < p.plane; ++i) {
        const BatchNormElement<T, T> in(p, offset + i, mean);
        if (p.d_dy != nullptr) {
          p.d_dy[offset + i] = a1 * in.v + (a2 * in.x + a3);
        }
        if (p.d_x != nullptr) {
          p.d_x[offset + i] = b1 * in.dy + (b2 * in.v + (b3 * in.x + b4));
        }
      }
    }
  }

  static MICROREG_ALWAYS_INLINE void run(const BatchNormProblem<T>& p, std::int64_t begin, std::int64_t end) {
    for (std::int64_t c = begin; c < end; ++c) {
      const BatchNormCoefficients k = p.coefficients(reduce(p, c), c);
      sweep(p, c, k);  // Right after the sums, while the channel is still in the cache.
      if (p.d_weight != nullptr) {
        p.d_weight[c] = static_cast<T>(k.d_weight);
      }
    }
  }
};

/// Sums over rows [begin, end) of a tensor [rows, channels]; `sums` holds five rows of `channels` float64 values.
template <class T>
struct BatchNormRowSums {
  using V = typename Lanes<T>::type;
  static constexpr std::int64_t width = Lanes<T>::count;

  static MICROREG_ALWAYS_INLINE void add(double* into, const V& sum) {
    for (std::int64_t lane = 0; lane < width; ++lane) {
      into[lane] += static_cast<double>(sum[lane]);
    }
  }

  static MICROREG_ALWAYS_INLINE void run(const BatchNormProblem<T>& p, std::int64_t begin, std::int64_t end,
                                         double* sums) {
    const std::int64_t channels = p.channels;
    for (std::int64_t row = begin; row < end; row += batch_norm_flush) {
      const std::int64_t stop = std::min(end, row + batch_norm_flush);
      std::int64_t c = 0;
      for (; c + width <= channels; c += width) {
        V mean;
        load(mean, p.mean + c);
        BatchNormSumsOf<V> lanes;
        for (std::int64_t i = row; i < stop; ++i) {
          const BatchNormLanes<T> in(p, i * channels + c, mean);
          lanes.add(in.x, in.dy, in.v);
        }
        add(sums + c, lanes.v);
        add(sums + channels + c, lanes.vx);
        add(sums + 2 * channels + c, lanes.dy);
        add(sums + 3 * channels + c, lanes.dyx);
        add(sums + 4 * channels + c, lanes.vdy);
      }
      for (; c < channels; ++c) {
        BatchNormSums total;
        for (std::int64_t i = row; i < stop; ++i) {
          const BatchNormElement<T, double> in(p, i * channels + c, p.mean[c]);
          total.add(in.x, in.dy, in.v);
        }
        sums[c] += total.v;
        sums[channels + c] += total.vx;
        sums[2 * channels + c] += total.dy;
        sums[3 * channels + c] += total.dyx;
        sums[4 * channels + c] += total.vdy;
      }
    }
  }
};

/// Writes rows [begin, end) of both results; `k` holds a1 a2 a3 b1 b2 b3 b4, a row of `channels` values each.
template <class T>
struct BatchNormRowSweep {
  using V = typename Lanes<T>::type;
  static constexpr std::int64_t width = Lanes<T>::count;

  static MICROREG_ALWAYS_INLINE void run(const BatchNormProblem<T>& p, std::int64_t begin, std::int64_t end,
                                         const T* k) {
    const std::int64_t channels = p.channels;
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t offset = row * channels;
      std::int64_t c = 0;
      for (; c + width <= channels; c += width) {
        V mean, k1, k2, k3, k4;
        load(mean, p.mean + c);
        const BatchNormLanes<T> in(p, offset + c, mean);
        if (p.d_dy != nullptr) {
          load(k1, k + c);
          load(k2, k + channels + c);
          load(k3, k + 2 * channels + c);
          const V result = k1 * in.v + (k2 * in.x + k3);
          store(p.d_dy + offset + c, result);
        }
        if (p.d_x != nullptr) {
          load(k1, k + 3 * channels + c);
          load(k2, k + 4 * channels + c);
          load(k3, k + 5 * channels + c);
          load(k4, k + 6 * channels + c);
          const V result = k1 * in.dy + (k2 * in.v + (k3 * in.x + k4));
          store(p.d_x + offset + c, result);
        }
      }
      for (; c < channels; ++c) {
        const BatchNormElement<T, T> in(p, offset + c, p.mean[c]);
        if (p.d_dy != nullptr) {
          p.d_dy[offset + c] = k[c] * in.v + (k[channels + c] * in.x + k[2 * channels + c]);
        }
        if (p.d_x != nullptr) {
          p.d_x[offset + c] = k[3 * channels + c] * in.dy +
                              (k[4 * channels + c] * in.v + (k[5 * channels + c] * in.x + k[6 * channels + c]));
        }
      }
    }
  }
};

/// Elements below which another thread costs more than it gains.
inline constexpr std::int64_t batch_norm_grain = 16384;

template <class T>
void batch_norm_planes(const BatchNormProblem<T>& problem) {
  const std::int64_t grain = std::max<std::int64_t>(1, batch_norm_grain / (problem.batch * problem.plane));
  at::parallel_for(0, problem.channels, grain, [&](std::int64_t begin, std::int64_t end) {
    run_widest<BatchNormPlanes<T>, const BatchNormProblem<T>&>(problem, begin, end);
  });
}

template <class T>
void batch_norm_rows(const BatchNormProblem<T>& problem) {
  const std::int64_t channels = problem.channels;
  const std::int64_t rows = problem.batch;
  const std::int64_t grain = std::max<std::int64_t>(1, batch_norm_grain / channels);
  // A fixed cut into parts, one sum each, so that the result depends on the number of threads alone.
  const std::int64_t parts = std::max<std::int64_t>(1, std::min<std::int64_t>(at::get_num_threads(), rows / grain));
  std::vector<double> sums(static_cast<std::size_t>(parts * 5 * channels), 0.0);
  at::parallel_for(0, parts, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = begin; part < end; ++part) {
      run_widest<BatchNormRowSums<T>, const BatchNormProblem<T>&>(
          problem, rows * part / parts, rows * (part + 1) / parts, sums.data() + part * 5 * channels);
    }
  });
  std::vector<T> k(static_cast<std::size_t>(7 * channels));
  for (std::int64_t c = 0; c < channels; ++c) {
    std::array<double, 5> total{};
    for (std::int64_t part = 0; part < parts; ++part) {
      for (std::int64_t i = 0; i < 5; ++i) {
        total[static_cast<std::size_t>(i)] += sums[static_cast<std::size_t>((part * 5 + i) * channels + c)];
      }
    }
    const BatchNormCoefficients q = problem.coefficients({total[0], total[1], total[2], total[3], total[4]}, c);
    const std::array<double, 7> values{q.a1, q.a2, q.a3, q.b1, q.b2, q.b3, q.b4};
    for (std::int64_t i = 0; i < 7; ++i) {
      k[static_cast<std::size_t>(i * channels + c)] = static_cast<T>(values[static_cast<std::size_t>(i)]);
    }
    if (problem.d_weight != nullptr) {
      problem.d_weight[c] = static_cast<T>(q.d_weight);
    }
  }
  at::parallel_for(0, rows, grain, [&](std::int64_t begin, std::int64_t end) {
    run_widest<BatchNormRowSweep<T>, const BatchNormProblem<T>&>(problem, begin, end, static_cast<const T*>(k.data()));
  });
}

}  // namespace microreg::detail
