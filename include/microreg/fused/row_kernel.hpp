/// @file
/// The kernel of everything that is normalised over rows: sums over a row, then a sweep that writes two results of it
/// while it is in the cache.
#pragma once

#include <ATen/ATen.h>
#include <microreg/detail/libtorch.hpp>
#include <microreg/detail/vector_kernels.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>

namespace microreg::inline MICROREG_ABI::detail {

/// What the backward of an operation read, x and dy, and what came in for its result, v; and where the results go.
template <class T>
struct Streams {
  const T *x, *dy, *v;
  T *d_dy, *d_x;
};

/// The rows that are summed over: row n is `parts` times `runs` times `length` elements, those of a run contiguous,
/// those of a part with the same weight. Run u of part p begins at (n row_step + p part_step + u run_step) length.
struct RowLayout {
  std::int64_t rows, parts, runs, length;  ///< length: at least that of Lanes
  std::int64_t row_step = 0, part_step = 0, run_step = 0;

  [[nodiscard]] std::int64_t offset(std::int64_t row, std::int64_t part, std::int64_t run) const {
    return (row * row_step + part * part_step + run * run_step) * length;
  }
};

/// Sums in lanes of T, which move on to float64 before rounding adds up.
template <class T, std::size_t count>
struct Sums {
  /// How many values a lane adds up.
  static constexpr std::int64_t flush_after = 64;

  typename Lanes<T>::type lanes[count]{};  // NOLINT(modernize-avoid-c-arrays): std::array ignores the alignment
  std::array<double, count> totals{};
  std::int64_t pending = 0;

  MICROREG_ALWAYS_INLINE void next() {
    if (++pending == flush_after) {
      flush();
    }
  }
  MICROREG_ALWAYS_INLINE void flush() {
    pending = 0;
    flush_each(std::make_index_sequence<count>());
  }

 private:
  template <std::size_t... each>  // by constants, or the lanes would live in memory
  MICROREG_ALWAYS_INLINE void flush_each(std::index_sequence<each...> /*unused*/) {
    ((totals[each] += total(lanes[each]), lanes[each] = typename Lanes<T>::type{}), ...);
  }
};

/// Rows [begin, end) by `Formula`, which is asked for a row after the other:
///
///     part(row, part)        what adds the products of a block to lanes, and what x is centred by
///     end_part(part, totals)
///     end_sums(row)          now the coefficients are known
///     sweep(row, part)       what makes the results of a block, and what x is centred by
///     end_row()
///
/// Parts and sweeps are values: the compiler would read what a formula holds anew after each store. `Stored` is what
/// lies in memory.
template <class Formula, class Stored = typename Formula::Number>
struct RowKernel {
  using T = typename Formula::Number;
  using V = typename Lanes<T>::type;

  static MICROREG_ALWAYS_INLINE void read(const Streams<Stored>& streams, std::int64_t at, T centre, V& x, V& dy,
                                          V& v) {
    load(x, streams.x + at);
    load(dy, streams.dy + at);
    load(v, streams.v + at);
    x -= centre;
  }

  static MICROREG_ALWAYS_INLINE void run(Formula& formula, const Streams<Stored>& to, const RowLayout& layout,
                                         std::int64_t begin, std::int64_t end) {
    const Streams<Stored> streams = to;
    const std::int64_t length = layout.length, runs = layout.runs, last = length - Lanes<T>::count;
    V x, dy, v, d_dy, d_x;
    for (std::int64_t row = begin; row < end; ++row) {
      for (std::int64_t p = 0; p < layout.parts; ++p) {
        const auto part = formula.part(row, p);
        Sums<T, Formula::sums> sums;
        for (std::int64_t run = 0; run < runs; ++run) {
          const std::int64_t offset = layout.offset(row, p, run);
          for (std::int64_t i = 0; i < length; i += Lanes<T>::count) {
            const std::int64_t at = std::min(i, last);  // a block before the end, in part summed already
            read(streams, offset + at, part.centre, x, dy, v);
            if (at != i) {
              drop_first<T>(dy, i - at);
              drop_first<T>(v, i - at);
            }
            part.add(sums.lanes, x, dy, v, at);
            sums.next();
          }
        }
        sums.flush();
        formula.end_part(p, sums.totals);
      }
      formula.end_sums(row);
      for (std::int64_t p = 0; p < layout.parts; ++p) {
        const auto sweep = formula.sweep(row, p);
        for (std::int64_t run = 0; run < runs; ++run) {
          const std::int64_t offset = layout.offset(row, p, run);
          for (std::int64_t i = 0; i < length; i += Lanes<T>::count) {
            const std::int64_t at = std::min(i, last);
            read(streams, offset + at, sweep.centre, x, dy, v);
            sweep.results(x, dy, v, at, i - at, d_dy, d_x);
            store(streams.d_dy + offset + at, d_dy);
            store(streams.d_x + offset + at, d_x);
          }
        }
      }
      formula.end_row();
    }
  }
};

/// A call's tensors as the kernels want them: the last dimension contiguous, and padded by zeros to the lanes' count.
template <class T>
class RowTensors {
 public:
  RowTensors(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& v)
      : length_(x.size(-1)),
        x_(padded(x)),
        dy_(padded(dy)),
        v_(v.defined() ? padded(v) : at::zeros_like(x_)),
        d_dy_(at::empty_like(x_)),
        d_x_(at::empty_like(x_)) {}

  /// A tensor with as many elements in its last dimension as those of the call have now. Padding keeps the layout, so
  /// that of channels-last is no sequence of rows yet.
  static at::Tensor padded(const at::Tensor& tensor) {
    const std::int64_t missing = Lanes<T>::count - tensor.size(-1);
    return (missing > 0 ? at::constant_pad_nd(tensor, {0, missing}) : tensor).contiguous();
  }
  [[nodiscard]] at::Tensor unpadded(const at::Tensor& tensor) const {
    return tensor.size(-1) == length_ ? tensor : tensor.narrow(-1, 0, length_).contiguous();
  }

  [[nodiscard]] std::int64_t length() const { return x_.size(-1); }
  [[nodiscard]] std::int64_t rows() const { return x_.numel() / length(); }
  [[nodiscard]] Streams<T> streams() {
    return {values_of<T>(x_), values_of<T>(dy_), values_of<T>(v_), d_dy_.mutable_data_ptr<T>(),
            d_x_.mutable_data_ptr<T>()};
  }
  [[nodiscard]] at::Tensor d_dy() const { return unpadded(d_dy_); }
  [[nodiscard]] at::Tensor d_x() const { return unpadded(d_x_); }

 private:
  std::int64_t length_;
  at::Tensor x_, dy_, v_, d_dy_, d_x_;
};

/// Runs `formula` over rows [begin, end) of such tensors.
template <class T, class Formula>
void run_rows(Formula& formula, const Streams<T>& streams, const RowLayout& layout, std::int64_t begin,
              std::int64_t end) {
  run_widest<RowKernel<Formula, T>, Formula&, const Streams<T>&, const RowLayout&>(formula, streams, layout, begin,
                                                                                   end);
}

/// How many rows of `elements` are worth another thread.
inline std::int64_t row_grain(std::int64_t elements) { return std::max<std::int64_t>(1, 16384 / elements); }

}  // namespace microreg::inline MICROREG_ABI::detail
