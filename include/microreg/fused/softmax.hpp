/// @file
/// Double backward of softmax over the last dimension on the CPU, in one pass over memory.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <microreg/detail/interception.hpp>
#include <microreg/detail/vector_kernels.hpp>

#include <algorithm>
#include <cstdint>

namespace microreg::detail {

/// Softmax's backward is d_x = y (dy - s), s = sum(dy y). For incoming v, with t = sum(v y),
///
///     d_dy = y (v - t)        d_y = v (dy - s) - dy t,
///
/// row by row; an output that is null is not wanted.
template <class T>
struct SoftmaxRows {
  using V = typename Lanes<T>::type;
  static constexpr std::int64_t width = Lanes<T>::count;

  static MICROREG_ALWAYS_INLINE void run(const T* ys, const T* dys, const T* vs, T* d_dy, T* d_y, std::int64_t length,
                                         std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t offset = row * length;
      V y, dy, v, s_lanes{}, t_lanes{};
      std::int64_t i = 0;
      for (; i + width <= length; i += width) {
        load(y, ys + offset + i);
        load(dy, dys + offset + i);
        load(v, vs + offset + i);
        s_lanes += dy * y;
        t_lanes += v * y;
      }
      double s_sum = 0, t_sum = 0;
      for (std::int64_t lane = 0; lane < width; ++lane) {
        s_sum += static_cast<double>(s_lanes[lane]);
        t_sum += static_cast<double>(t_lanes[lane]);
      }
      for (; i < length; ++i) {
        const double weight = static_cast<double>(ys[offset + i]);
        s_sum += static_cast<double>(dys[offset + i]) * weight;
        t_sum += static_cast<double>(vs[offset + i]) * weight;
      }
      const T s = static_cast<T>(s_sum);
      const T t = static_cast<T>(t_sum);
      for (i = 0; i + width <= length; i += width) {
        load(y, ys + offset + i);
        load(dy, dys + offset + i);
        load(v, vs + offset + i);
        if (d_dy != nullptr) {
          const V result = y * (v - t);
          store(d_dy + offset + i, result);
        }
        if (d_y != nullptr) {
          const V result = v * (dy - s) - dy * t;
          store(d_y + offset + i, result);
        }
      }
      for (; i < length; ++i) {
        if (d_dy != nullptr) {
          d_dy[offset + i] = ys[offset + i] * (vs[offset + i] - t);
        }
        if (d_y != nullptr) {
          d_y[offset + i] = vs[offset + i] * (dys[offset + i] - s) - dys[offset + i] * t;
        }
      }
    }
  }
};

template <class T>
void softmax_double_backward(const at::Tensor& y, const at::Tensor& dy, const at::Tensor& v, at::Tensor& d_dy,
                             at::Tensor& d_y) {
  const std::int64_t length = y.size(-1);
  const std::int64_t grain = std::max<std::int64_t>(1, 16384 / length);
  T* const to_dy = d_dy.defined() ? d_dy.mutable_data_ptr<T>() : nullptr;
  T* const to_y = d_y.defined() ? d_y.mutable_data_ptr<T>() : nullptr;
  at::parallel_for(0, y.numel() / length, grain, [&](std::int64_t begin, std::int64_t end) {
    run_widest<SoftmaxRows<T>>(y.const_data_ptr<T>(), dy.const_data_ptr<T>(), v.const_data_ptr<T>(), to_dy, to_y,
                               length, begin, end);
  });
}

/// Softmax's backward as a node with the double backward above.
struct SoftmaxBackward : torch::autograd::Function<SoftmaxBackward> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& dy, const at::Tensor& y) {
    context->save_for_backward({dy, y});
    context->set_materialize_grads(false);
    return at::_softmax_backward_data(dy, y, -1, y.scalar_type());
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list upstream) {
    if (!upstream[0].defined()) {
      return {{}, {}};
    }
    const auto saved = context->get_saved_variables();
    const at::Tensor& dy = saved[0];
    const at::Tensor& y = saved[1];
    const at::Tensor& v = upstream[0];
    at::Tensor d_dy;
    at::Tensor d_y;
    if (at::GradMode::is_enabled()) {
      d_dy = y * (v - (v * y).sum(-1, true));
      d_y = v * (dy - (dy * y).sum(-1, true)) - dy * (v * y).sum(-1, true);
      return {d_dy, d_y};
    }
    const at::Tensor ys = y.contiguous(), dys = dy.contiguous(), vs = v.contiguous();
    d_dy = context->needs_input_grad(0) ? at::empty_like(ys) : at::Tensor();
    d_y = context->needs_input_grad(1) ? at::empty_like(ys) : at::Tensor();
    if (y.scalar_type() == at::kDouble) {
      softmax_double_backward<double>(ys, dys, vs, d_dy, d_y);
    } else {
      softmax_double_backward<float>(ys, dys, vs, d_dy, d_y);
    }
    return {d_dy, d_y};
  }
};

inline at::Tensor softmax_backward_kernel(const at::Tensor& dy, const at::Tensor& y, std::int64_t dim,
                                          at::ScalarType input_type) {
  const StockKernels stock;
  const bool last = y.dim() > 0 && (dim == -1 || dim == y.dim() - 1);
  if (!last || !y.is_cpu() || y.numel() == 0 || input_type != y.scalar_type() || !should_fuse({dy, y})) {
    return at::_softmax_backward_data(dy, y, dim, input_type);
  }
  return SoftmaxBackward::apply(dy, y);
}

}  // namespace microreg::detail
