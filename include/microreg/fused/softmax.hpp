/// @file
/// Double backward of softmax over the last dimension, on the CPU in one pass over memory.
#pragma once

#include <ATen/ATen.h>
#include <microreg/detail/parallel.hpp>
#include <microreg/fused/row_kernel.hpp>
#include <microreg/fused/rule.hpp>

#include <array>
#include <cstdint>

namespace microreg::inline MICROREG_ABI::detail {

/// Softmax's backward is d_x = y (dy - s), s = sum(dy y). For incoming v, with t = sum(v y), row by row:
///
///     d_dy = y (v - t)        d_y = v (dy - s) - dy t.
///
/// Of tensors, or of lanes, with the sums of their row.
template <class Values, class Sum>
MICROREG_ALWAYS_INLINE void softmax_derivatives(const Values& y, const Values& dy, const Values& v, const Sum& s,
                                                const Sum& t, Values& d_dy, Values& d_y) {
  d_dy = y * (v - t);
  d_y = v * (dy - s) - dy * t;
}

/// For RowKernel.
template <class T>
class Softmax {
 public:
  using Number = T;
  using V = typename Lanes<T>::type;
  static constexpr std::size_t sums = 2;

  struct Part {
    T centre{0};

    MICROREG_ALWAYS_INLINE void add(V* lanes, const V& y, const V& dy, const V& v, std::int64_t /*at*/) const {
      lanes[0] += dy * y;
      lanes[1] += v * y;
    }
  };
  struct Sweep {
    T s, t, centre{0};

    MICROREG_ALWAYS_INLINE void results(const V& y, const V& dy, const V& v, std::int64_t /*at*/, std::int64_t /*skip*/,
                                        V& d_dy, V& d_y) const {
      softmax_derivatives(y, dy, v, s, t, d_dy, d_y);
    }
  };

  MICROREG_ALWAYS_INLINE Part part(std::int64_t /*row*/, std::int64_t /*part*/) const { return {}; }
  MICROREG_ALWAYS_INLINE void end_part(std::int64_t /*part*/, const std::array<double, sums>& totals) {
    totals_ = totals;
  }
  MICROREG_ALWAYS_INLINE void end_sums(std::int64_t /*row*/) {}
  MICROREG_ALWAYS_INLINE Sweep sweep(std::int64_t /*row*/, std::int64_t /*part*/) const {
    return {static_cast<T>(totals_[0]), static_cast<T>(totals_[1])};
  }
  MICROREG_ALWAYS_INLINE void end_row() {}

 private:
  std::array<double, sums> totals_{};
};

inline constexpr Rule softmax_backward_rule{
    .schema =
        "aten::_softmax_backward_data(Tensor grad_output, Tensor output, int dim, ScalarType input_dtype) -> Tensor",
    .inputs = {0, 1},
    .saved = {0, 1},
    .derivative = [](const Call& call, const Tensors& upstream, OutputMask /*needs*/) -> Tensors {
      at::Tensor dy = call.tensor(0), y = call.tensor(1), v = upstream[0];
      widen_unless_read(runs_kernels(y), {&dy, &y, &v});
      if (!runs_kernels(y)) {
        Tensors results(2);
        softmax_derivatives(y, dy, v, (dy * y).sum(-1, true), (v * y).sum(-1, true), results[0], results[1]);
        return results;
      }
      Tensors out;
      with_type(y.scalar_type(), [&](auto zero) {
        using Stored = decltype(zero);
        RowTensors<Stored> tensors(y, dy, v);
        const RowLayout layout{
            .rows = tensors.rows(), .parts = 1, .runs = 1, .length = tensors.length(), .row_step = 1};
        parallel_for(0, layout.rows, row_grain(layout.length), [&](std::int64_t begin, std::int64_t end) {
          Softmax<typename Lanes<Stored>::Number> softmax;
          run_rows(softmax, tensors.streams(), layout, begin, end);
        });
        out = {tensors.d_dy(), tensors.d_x()};
      });
      return out;
    },
    .fits =
        [](const Call& call) {
          const at::Tensor y = call.tensor(1);
          const std::int64_t dim = call.arguments[2].toInt();
          return y.dim() > 0 && (dim == -1 || dim == y.dim() - 1) && y.is_cpu() && y.numel() > 0 &&
                 call.arguments[3].toScalarType() == y.scalar_type();
        },
    .halves = HalfTypes::widened_by_formula};

}  // namespace microreg::inline MICROREG_ABI::detail
