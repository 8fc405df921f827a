/// @file
/// Double backward of normalisation on the CPU: the formula of normalisation.hpp over rows whose parts have one weight
/// each, over rows along which the weight varies, and over columns.
#pragma once

#include <ATen/ATen.h>
#include <microreg/detail/libtorch.hpp>
#include <microreg/detail/parallel.hpp>
#include <microreg/detail/vector_kernels.hpp>
#include <microreg/fused/normalisation.hpp>
#include <microreg/fused/row_kernel.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// Statistics of rows and what belongs to channels (or places); weight, a, b may be null.
template <class T>
struct NormPointers {
  const T *mean, *rstd, *weight, *a, *b;
  double m;  ///< elements that are normalised together

  [[nodiscard]] double weight_of(std::int64_t i) const {
    return weight != nullptr ? static_cast<double>(weight[i]) : 1;
  }
  [[nodiscard]] double a_of(std::int64_t i) const { return a != nullptr ? static_cast<double>(a[i]) : 0; }
  [[nodiscard]] double b_of(std::int64_t i) const { return b != nullptr ? static_cast<double>(b[i]) : 0; }
};

/// {sum v, sum v x, sum dy, sum dy x, sum v dy}: all that elements of one weight add.
template <class V>
MICROREG_ALWAYS_INLINE void add_moments(V* lanes, const V& x, const V& dy, const V& v) {
  lanes[0] += v;
  lanes[1] += v * x;
  lanes[2] += dy;
  lanes[3] += dy * x;
  lanes[4] += v * dy;
}
using Moments = std::array<double, 5>;

MICROREG_ALWAYS_INLINE void add_part(NormSums<double>& sums, const Moments& part, double weight, double a) {
  sums.v += part[0];
  sums.vx += part[1];
  sums.h += weight * part[2];
  sums.hx += weight * part[3];
  sums.vh += weight * part[4];
  sums.q += a * part[2];
  sums.qx += a * part[3];
}

/// What a part gives to the derivative by its weight.
MICROREG_ALWAYS_INLINE double weight_gradient(const NormRow<double>& row, const Moments& part) {
  return norm_weight_gradient(row, part[2], part[3], part[4]);
}

/// The coefficients of the results, each a number or lanes.
template <class A, class C>
struct NormResults {
  A a, b, constant;
  C c, d, e;

  template <class V>
  MICROREG_ALWAYS_INLINE void operator()(const V& x, const V& dy, const V& v, V& d_dy, V& d_x) const {
    d_dy = a * v + (b * x + constant);
    d_x = b * dy + (c * v + (d * x + e));
  }
};
inline constexpr std::size_t norm_coefficients = 6;
inline std::array<double, norm_coefficients> results_of(const NormRow<double>& row, double weight, double a, double b) {
  const NormAffine<double> affine(row, weight, a, b);
  return {affine.a, affine.b, affine.constant, row.c, row.d, row.e};
}

/// Rows whose parts are channels: planes of batch normalisation (a row is a channel) and group normalisation.
template <class T>
class ChannelNorm {
 public:
  using Number = T;
  using V = typename Lanes<T>::type;
  static constexpr std::size_t sums = 5;

  struct Part {
    T centre;

    MICROREG_ALWAYS_INLINE void add(V* lanes, const V& x, const V& dy, const V& v, std::int64_t /*at*/) const {
      add_moments(lanes, x, dy, v);
    }
  };
  struct Sweep {
    T centre;
    NormResults<T, T> make;

    MICROREG_ALWAYS_INLINE void results(const V& x, const V& dy, const V& v, std::int64_t /*at*/, std::int64_t /*skip*/,
                                        V& d_dy, V& d_x) const {
      make(x, dy, v, d_dy, d_x);
    }
  };

  /// `d_weight` gets what each part of each row gives.
  ChannelNorm(const NormPointers<T>& pointers, std::int64_t parts, std::int64_t channels, double* d_weight)
      : p_(pointers), channels_(channels), moments_(static_cast<std::size_t>(parts)), d_weight_(d_weight) {}

  MICROREG_ALWAYS_INLINE Part part(std::int64_t row, std::int64_t /*part*/) const { return {p_.mean[row]}; }
  MICROREG_ALWAYS_INLINE void end_part(std::int64_t part, const Moments& moments) {
    moments_[static_cast<std::size_t>(part)] = moments;
  }
  MICROREG_ALWAYS_INLINE void end_sums(std::int64_t row) {
    const auto parts = static_cast<std::int64_t>(moments_.size());
    channel_ = row * parts % channels_;
    NormSums<double> total{};
    for (std::int64_t part = 0; part < parts; ++part) {
      const std::int64_t c = channel_ + part;
      add_part(total, moments_[static_cast<std::size_t>(part)], p_.weight_of(c), p_.a_of(c));
    }
    row_ = norm_row(total, p_.m, static_cast<double>(p_.rstd[row]));
    for (std::int64_t part = 0; part < parts; ++part) {
      d_weight_[row * parts + part] = weight_gradient(row_, moments_[static_cast<std::size_t>(part)]);
    }
  }
  MICROREG_ALWAYS_INLINE Sweep sweep(std::int64_t row, std::int64_t part) const {
    const std::int64_t c = channel_ + part;
    const auto k = results_of(row_, p_.weight_of(c), p_.a_of(c), p_.b_of(c));
    return {p_.mean[row],
            {static_cast<T>(k[0]), static_cast<T>(k[1]), static_cast<T>(k[2]), static_cast<T>(k[3]),
             static_cast<T>(k[4]), static_cast<T>(k[5])}};
  }
  MICROREG_ALWAYS_INLINE void end_row() {}

 private:
  NormPointers<T> p_;
  std::int64_t channels_;
  std::int64_t channel_ = 0;      // of the row's first part
  std::vector<Moments> moments_;  // by part
  double* d_weight_;
  NormRow<double> row_{};
};

/// Rows along which weight, a and b vary, none of them null: layer normalisation. The coefficients are those of
/// NormAffine, whose constant each element would have to itself; r p(v), which d_weight needs, is in their place.
template <class T>
class ElementNorm {
 public:
  using Number = T;
  using V = typename Lanes<T>::type;
  static constexpr std::size_t sums = 7;

  struct Part {
    T centre;
    const T *weight, *a;

    MICROREG_ALWAYS_INLINE void add(V* lanes, const V& x, const V& dy, const V& v, std::int64_t at) const {
      V w, a_in;
      load(w, weight + at);
      load(a_in, a + at);
      const V h = w * dy, q = a_in * dy;
      add_moments(lanes, x, h, v);
      lanes[5] += q;
      lanes[6] += q * x;
    }
  };
  struct Sweep {
    T centre;
    NormPointers<T> p;
    NormRow<T> row;
    T* d_weight;

    MICROREG_ALWAYS_INLINE void results(const V& x, const V& dy, const V& v, std::int64_t at, std::int64_t skip,
                                        V& d_dy, V& d_x) const {
      V w, a, b, sum;
      load(w, p.weight + at);
      load(a, p.a + at);
      load(b, p.b + at);
      load(sum, d_weight + at);
      const V across = row.r * (v - row.v0 - row.v1 * x);  // r p(v)
      V gradient = dy * across;
      if (skip != 0) {
        drop_first<T>(gradient, skip);
      }
      sum += gradient;
      store(d_weight + at, sum);
      d_dy = w * across + (row.r * a * x + b);
      d_x = row.r * (a - row.v1 * w) * dy + (row.c * v + (row.d * x + row.e));
    }
  };

  /// The sum over the rows is added to `d_weight`, of `length` elements, by flush() too.
  ElementNorm(const NormPointers<T>& pointers, std::int64_t length, double* d_weight)
      : p_(pointers), pending_(static_cast<std::size_t>(length), T{0}), d_weight_(d_weight) {}

  MICROREG_ALWAYS_INLINE Part part(std::int64_t row, std::int64_t /*part*/) const {
    return {p_.mean[row], p_.weight, p_.a};
  }
  MICROREG_ALWAYS_INLINE void end_part(std::int64_t /*part*/, const std::array<double, sums>& total) {
    totals_ = total;
  }
  MICROREG_ALWAYS_INLINE void end_sums(std::int64_t row) {
    const auto& [v, vx, h, hx, vh, q, qx] = totals_;
    const auto k = norm_row<double>({v, vx, h, hx, vh, q, qx}, p_.m, static_cast<double>(p_.rstd[row]));
    row_ = {static_cast<T>(k.r), static_cast<T>(k.v0), static_cast<T>(k.v1),
            static_cast<T>(k.c), static_cast<T>(k.d),  static_cast<T>(k.e)};
  }
  MICROREG_ALWAYS_INLINE Sweep sweep(std::int64_t row, std::int64_t /*part*/) {
    return {p_.mean[row], p_, row_, pending_.data()};
  }
  MICROREG_ALWAYS_INLINE void end_row() {
    if (++rows_ % Sums<T, sums>::flush_after == 0) {
      flush();
    }
  }
  void flush() {
    for (std::size_t i = 0; i < pending_.size(); ++i) {
      d_weight_[i] += static_cast<double>(pending_[i]);
      pending_[i] = T{0};
    }
  }

 private:
  NormPointers<T> p_;
  std::vector<T> pending_;
  double* d_weight_;
  std::array<double, sums> totals_{};
  NormRow<T> row_{};
  std::int64_t rows_ = 0;
};

/// The moments of the columns of rows [begin, end), of `width` elements each, added to `sums`: five rows of `width`.
template <class T, class Stored>
struct ColumnSums {
  using V = typename Lanes<T>::type;

  static MICROREG_ALWAYS_INLINE void run(const Streams<Stored>& streams, const T* mean, std::int64_t width,
                                         std::int64_t begin, std::int64_t end, double* sums) {
    V centre, x, dy, v;
    for (std::int64_t row = begin; row < end; row += Sums<T, 5>::flush_after) {
      const std::int64_t stop = std::min(end, row + Sums<T, 5>::flush_after);
      for (std::int64_t i = 0; i < width; i += Lanes<T>::count) {
        const std::int64_t at = std::min(i, width - Lanes<T>::count);
        load(centre, mean + at);
        V lanes[5]{};  // NOLINT(modernize-avoid-c-arrays): std::array ignores the alignment
        for (std::int64_t n = row; n < stop; ++n) {
          load(x, streams.x + n * width + at);
          load(dy, streams.dy + n * width + at);
          load(v, streams.v + n * width + at);
          x -= centre;
          add_moments(lanes, x, dy, v);
        }
        for (std::int64_t lane = i - at; lane < Lanes<T>::count; ++lane) {
          sums[at + lane] += static_cast<double>(lanes[0][lane]);
          sums[width + at + lane] += static_cast<double>(lanes[1][lane]);
          sums[2 * width + at + lane] += static_cast<double>(lanes[2][lane]);
          sums[3 * width + at + lane] += static_cast<double>(lanes[3][lane]);
          sums[4 * width + at + lane] += static_cast<double>(lanes[4][lane]);
        }
      }
    }
  }
};

/// The results of rows [begin, end); `k` holds a row of `width` values for each coefficient.
template <class T, class Stored>
struct ColumnSweep {
  using V = typename Lanes<T>::type;

  static MICROREG_ALWAYS_INLINE void run(const Streams<Stored>& streams, const T* mean, std::int64_t width,
                                         std::int64_t begin, std::int64_t end, const T* k) {
    V centre, x, dy, v, d_dy, d_x;
    NormResults<V, V> results;
    for (std::int64_t row = begin; row < end; ++row) {
      for (std::int64_t i = 0; i < width; i += Lanes<T>::count) {
        const std::int64_t at = std::min(i, width - Lanes<T>::count);
        load(centre, mean + at);
        load(results.a, k + at);
        load(results.b, k + width + at);
        load(results.constant, k + 2 * width + at);
        load(results.c, k + 3 * width + at);
        load(results.d, k + 4 * width + at);
        load(results.e, k + 5 * width + at);
        load(x, streams.x + row * width + at);
        load(dy, streams.dy + row * width + at);
        load(v, streams.v + row * width + at);
        x -= centre;
        results(x, dy, v, d_dy, d_x);
        store(streams.d_dy + row * width + at, d_dy);
        store(streams.d_x + row * width + at, d_x);
      }
    }
  }
};

/// Contiguous parts of a problem, as the kernels read them.
template <class T>
NormPointers<T> pointers_of(NormProblem& p) {
  const auto pointer = [](at::Tensor& tensor) {
    tensor = tensor.defined() ? tensor.contiguous() : tensor;
    return tensor.defined() ? values_of<T>(tensor) : nullptr;
  };
  return {pointer(p.mean), pointer(p.rstd), pointer(p.weight), pointer(p.a), pointer(p.b), p.count()};
}

/// Runs body(part, from, to) for parts of `rows`, the result of each its own: the cut depends on the number of threads
/// alone, and with it the order of sums.
template <class Body>
void for_parts(std::int64_t rows, std::int64_t parts, const Body& body) {
  parallel_for(0, parts, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = begin; part < end; ++part) {
      body(part, rows * part / parts, rows * (part + 1) / parts);
    }
  });
}
inline std::int64_t parts_of(std::int64_t rows, std::int64_t elements) {
  return std::max<std::int64_t>(1, std::min<std::int64_t>(at::get_num_threads(), rows / row_grain(elements)));
}

/// The sums of the columns of a matrix of `width` columns, like `like`.
template <class T>
at::Tensor sum_of_rows(const std::vector<double>& matrix, std::int64_t width, const at::Tensor& like) {
  std::vector<double> sums(matrix.begin(), matrix.begin() + width);
  for (std::size_t i = sums.size(); i < matrix.size(); ++i) {
    sums[i % sums.size()] += matrix[i];
  }
  at::Tensor result = at::empty({width}, like.options());
  std::transform(sums.begin(), sums.end(), result.mutable_data_ptr<T>(),
                 [](double sum) { return static_cast<T>(sum); });
  return result;
}

/// Where x lies in runs of layout.length elements of a channel. The results are those of norm_double_backward_aten().
template <class Stored>
std::array<at::Tensor, 3> channel_norm(NormProblem p, RowLayout layout, std::int64_t channels) {
  using T = typename Lanes<Stored>::Number;
  const auto runs = [&](const at::Tensor& t) { return t.defined() ? t.reshape({-1, layout.length}) : t; };
  RowTensors<Stored> tensors(runs(p.x), runs(p.dy), runs(p.v));
  layout.length = tensors.length();
  const NormPointers<T> pointers = pointers_of<T>(p);
  std::vector<double> d_weight(static_cast<std::size_t>(layout.rows * layout.parts));
  parallel_for(0, layout.rows, row_grain(layout.parts * layout.runs * layout.length),
               [&](std::int64_t begin, std::int64_t end) {
                 ChannelNorm<T> norm(pointers, layout.parts, channels, d_weight.data());
                 run_rows(norm, tensors.streams(), layout, begin, end);
               });
  return {tensors.d_dy().view_as(p.x), tensors.d_x().view_as(p.x), sum_of_rows<T>(d_weight, channels, p.mean)};
}

/// Where x is a matrix whose rows are normalised, and weight, a, b are vectors along them.
template <class Stored>
std::array<at::Tensor, 3> element_norm(NormProblem p) {
  using T = typename Lanes<Stored>::Number;
  const auto vector = [&](const at::Tensor& t, double value) {
    return RowTensors<T>::padded(t.defined() ? t : at::full({p.x.size(1)}, value, p.mean.options()));
  };
  p.weight = vector(p.weight, 1);
  p.a = vector(p.a, 0);
  p.b = vector(p.b, 0);
  RowTensors<Stored> tensors(p.x, p.dy, p.v);
  const NormPointers<T> pointers = pointers_of<T>(p);
  const std::int64_t rows = tensors.rows(), length = tensors.length();
  const std::int64_t parts = parts_of(rows, length);
  const RowLayout layout{.rows = rows, .parts = 1, .runs = 1, .length = length, .row_step = 1};
  std::vector<double> d_weight(static_cast<std::size_t>(parts * length));
  for_parts(rows, parts, [&](std::int64_t part, std::int64_t begin, std::int64_t end) {
    ElementNorm<T> norm(pointers, length, d_weight.data() + part * length);
    run_rows(norm, tensors.streams(), layout, begin, end);
    norm.flush();
  });
  return {tensors.d_dy(), tensors.d_x(), tensors.unpadded(sum_of_rows<T>(d_weight, length, p.mean))};
}

/// Where x is best read as a matrix with a column for each channel: in the channels-last layout it is one.
template <class Stored>
std::array<at::Tensor, 3> column_norm(NormProblem p) {
  using T = typename Lanes<Stored>::Number;
  const std::int64_t channels = p.x.size(1);
  const auto last = [&](const at::Tensor& t) { return t.defined() ? t.movedim(1, -1) : t; };
  const auto matrix = [&](const at::Tensor& t) { return t.defined() ? last(t).reshape({-1, channels}) : t; };
  RowTensors<Stored> tensors(matrix(p.x), matrix(p.dy), matrix(p.v));
  const std::int64_t rows = tensors.rows(), width = tensors.length();
  const std::int64_t parts = parts_of(rows, width);
  const at::Tensor mean = RowTensors<T>::padded(p.mean.flatten());
  const NormPointers<T> pointers = pointers_of<T>(p);
  const at::Tensor sums = at::zeros({parts, 5, width}, p.mean.options().dtype(at::kDouble));
  for_parts(rows, parts, [&](std::int64_t part, std::int64_t begin, std::int64_t end) {
    run_widest<ColumnSums<T, Stored>, const Streams<Stored>&>(tensors.streams(), values_of<T>(mean), width, begin, end,
                                                              sums.mutable_data_ptr<double>() + part * 5 * width);
  });
  const at::Tensor total = sums.sum(0);
  const double* const of = values_of<double>(total);
  const at::Tensor coefficients = at::zeros({norm_coefficients, width}, p.mean.options());
  at::Tensor d_weight = at::empty({channels}, p.mean.options());
  for (std::int64_t c = 0; c < channels; ++c) {
    const Moments moments{of[c], of[width + c], of[2 * width + c], of[3 * width + c], of[4 * width + c]};
    NormSums<double> all{};
    add_part(all, moments, pointers.weight_of(c), pointers.a_of(c));
    const auto row = norm_row(all, pointers.m, static_cast<double>(pointers.rstd[c]));
    T* to = coefficients.mutable_data_ptr<T>() + c;
    for (const double value : results_of(row, pointers.weight_of(c), pointers.a_of(c), pointers.b_of(c))) {
      *to = static_cast<T>(value);
      to += width;
    }
    d_weight.mutable_data_ptr<T>()[c] = static_cast<T>(weight_gradient(row, moments));
  }
  parallel_for(0, rows, row_grain(width), [&](std::int64_t begin, std::int64_t end) {
    run_widest<ColumnSweep<T, Stored>, const Streams<Stored>&>(tensors.streams(), values_of<T>(mean), width, begin, end,
                                                               values_of<T>(coefficients));
  });
  const auto back = [&](const at::Tensor& t) { return t.view(last(p.x).sizes()).movedim(-1, 1); };
  const auto format = p.x.suggest_memory_format();
  return {back(tensors.d_dy()).contiguous(format), back(tensors.d_x()).contiguous(format), d_weight};
}

}  // namespace microreg::inline MICROREG_ABI::detail
