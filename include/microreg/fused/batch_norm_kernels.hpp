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

/// Sums over the m elements of a channel, x_c = x - mean: v, v * x_c, dy, dy * x_c, v * dy.
struct BatchNormSums {
  double v = 0, vx = 0, dy = 0, dyx = 0, vdy = 0;
};

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

/// How many values a lane adds up in T before the sum moves on to float64: keeps float32 sums accurate for channels of
/// any length.
inline constexpr std::int64_t batch_norm_flush = 64;

/// Channels [begin, end) of a tensor whose channel planes are contiguous.
template <class T>
struct BatchNormPlanes {
  using V = typename Lanes<T>::type;
  static constexpr std::int64_t width = Lanes<T>::count;

  static MICROREG_ALWAYS_INLINE void flush(V& sum, double& into) {
    for (std::int64_t lane = 0; lane < width; ++lane) {
      into += static_cast<double>(sum[lane]);
    }
    sum = V{};
  }

  static MICROREG_ALWAYS_INLINE BatchNormSums reduce(const BatchNormProblem<T>& p, std::int64_t c) {
    BatchNormSums total;
    V sv{}, svx{}, sdy{}, sdyx{}, svdy{};
    V zero{};
    std::int64_t pending = 0;
    const T mean = p.mean[c];
    for (std::int64_t n = 0; n < p.batch; ++n) {
      const std::int64_t offset = (n * p.channels + c) * p.plane;
      std::int64_t i = 0;
      for (; i + width <= p.plane; i += width) {
        V x, dy, v = zero;
        load(x, p.x + offset + i);
        load(dy, p.dy + offset + i);
        if (p.v != nullptr) {
          load(v, p.v + offset + i);
        }
        x -= mean;
        sv += v;
        svx += v * x;
        sdy += dy;
        sdyx += dy * x;
        svdy += v * dy;
        if (++pending == batch_norm_flush) {
          pending = 0;
          flush(sv, total.v), flush(svx, total.vx), flush(sdy, total.dy), flush(sdyx, total.dyx),
              flush(svdy, total.vdy);
        }
      }
      for (; i < p.plane; ++i) {
        const double x = static_cast<double>(p.x[offset + i]) - static_cast<double>(mean);
        const double dy = static_cast<double>(p.dy[offset + i]);
        const double v = p.v != nullptr ? static_cast<double>(p.v[offset + i]) : 0.0;
        total.v += v;
        total.vx += v * x;
        total.dy += dy;
        total.dyx += dy * x;
        total.vdy += v * dy;
      }
    }
    flush(sv, total.v), flush(svx, total.vx), flush(sdy, total.dy), flush(sdyx, total.dyx), flush(svdy, total.vdy);
    return total;
  }

  static MICROREG_ALWAYS_INLINE void sweep(const BatchNormProblem<T>& p, std::int64_t c,
                                           const BatchNormCoefficients& k) {
    const T mean = p.mean[c];
    const T a1 = static_cast<T>(k.a1), a2 = static_cast<T>(k.a2), a3 = static_cast<T>(k.a3);
    const T b1 = static_cast<T>(k.b1), b2 = static_cast<T>(k.b2), b3 = static_cast<T>(k.b3), b4 = static_cast<T>(k.b4);
    V zero{};
    for (std::int64_t n = 0; n < p.batch; ++n) {
      const std::int64_t offset = (n * p.channels + c) * p.plane;
      std::int64_t i = 0;
      for (; i + width <= p.plane; i += width) {
        V x, dy, v = zero;
        load(x, p.x + offset + i);
        load(dy, p.dy + offset + i);
        if (p.v != nullptr) {
          load(v, p.v + offset + i);
        }
        x -= mean;
        if (p.d_dy != nullptr) {
          const V result = a1 * v + (a2 * x + a3);
          store(p.d_dy + offset + i, result);
        }
        if (p.d_x != nullptr) {
          const V result = b1 * dy + (b2 * v + (b3 * x + b4));
          store(p.d_x + offset + i, result);
        }
      }
      for (; i < p.plane; ++i) {
        const T x = p.x[offset + i] - mean;
        const T v = p.v != nullptr ? p.v[offset + i] : T{0};
        if (p.d_dy != nullptr) {
          p.d_dy[offset + i] = a1 * v + (a2 * x + a3);
        }
        if (p.d_x != nullptr) {
          p.d_x[offset + i] = b1 * p.dy[offset + i] + (b2 * v + (b3 * x + b4));
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
    const V zero{};
    for (std::int64_t row = begin; row < end; row += batch_norm_flush) {
      const std::int64_t stop = std::min(end, row + batch_norm_flush);
      std::int64_t c = 0;
      for (; c + width <= channels; c += width) {
        V mean, sv{}, svx{}, sdy{}, sdyx{}, svdy{};
        load(mean, p.mean + c);
        for (std::int64_t i = row; i < stop; ++i) {
          V x, dy, v = zero;
          load(x, p.x + i * channels + c);
          load(dy, p.dy + i * channels + c);
          if (p.v != nullptr) {
            load(v, p.v + i * channels + c);
          }
          x -= mean;
          sv += v;
          svx += v * x;
          sdy += dy;
          sdyx += dy * x;
          svdy += v * dy;
        }
        add(sums + c, sv);
        add(sums + channels + c, svx);
        add(sums + 2 * channels + c, sdy);
        add(sums + 3 * channels + c, sdyx);
        add(sums + 4 * channels + c, svdy);
      }
      for (; c < channels; ++c) {
        for (std::int64_t i = row; i < stop; ++i) {
          const double x = static_cast<double>(p.x[i * channels + c]) - static_cast<double>(p.mean[c]);
          const double dy = static_cast<double>(p.dy[i * channels + c]);
          const double v = p.v != nullptr ? static_cast<double>(p.v[i * channels + c]) : 0.0;
          sums[c] += v;
          sums[channels + c] += v * x;
          sums[2 * channels + c] += dy;
          sums[3 * channels + c] += dy * x;
          sums[4 * channels + c] += v * dy;
        }
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
    const V zero{};
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t offset = row * channels;
      std::int64_t c = 0;
      for (; c + width <= channels; c += width) {
        V x, dy, v = zero, mean, k1, k2, k3, k4;
        load(x, p.x + offset + c);
        load(dy, p.dy + offset + c);
        load(mean, p.mean + c);
        if (p.v != nullptr) {
          load(v, p.v + offset + c);
        }
        x -= mean;
        if (p.d_dy != nullptr) {
          load(k1, k + c);
          load(k2, k + channels + c);
          load(k3, k + 2 * channels + c);
          const V result = k1 * v + (k2 * x + k3);
          store(p.d_dy + offset + c, result);
        }
        if (p.d_x != nullptr) {
          load(k1, k + 3 * channels + c);
          load(k2, k + 4 * channels + c);
          load(k3, k + 5 * channels + c);
          load(k4, k + 6 * channels + c);
          const V result = k1 * dy + (k2 * v + (k3 * x + k4));
          store(p.d_x + offset + c, result);
        }
      }
      for (; c < channels; ++c) {
        const T x = p.x[offset + c] - p.mean[c];
        const T v = p.v != nullptr ? p.v[offset + c] : T{0};
        if (p.d_dy != nullptr) {
          p.d_dy[offset + c] = k[c] * v + (k[channels + c] * x + k[2 * channels + c]);
        }
        if (p.d_x != nullptr) {
          p.d_x[offset + c] = k[3 * channels + c] * p.dy[offset + c] +
                              (k[4 * channels + c] * v + (k[5 * channels + c] * x + k[6 * channels + c]));
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
