/// @file
/// Double backward of GELU (the exact form, by the error function) without LibTorch's twenty elementwise passes.
#pragma once

#include <ATen/ATen.h>
#include <microreg/detail/libtorch.hpp>
#include <microreg/detail/parallel.hpp>
#include <microreg/detail/vector_kernels.hpp>
#include <microreg/fused/rule.hpp>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <numbers>
#include <type_traits>

namespace microreg::inline MICROREG_ABI::detail {

/// v * dy * gelu''(x) with gelu''(x) = phi(x) (2 - x^2), phi the standard normal density, of x^2 and its exp(-x^2 / 2):
/// of tensors, lanes or numbers.
template <class Scalar, class Values>
MICROREG_ALWAYS_INLINE void gelu_second(const Values& v, const Values& dy, const Values& square, const Values& power,
                                        Values& out) {
  constexpr Scalar inverse_root_two_pi = std::numbers::inv_sqrtpi_v<Scalar> / std::numbers::sqrt2_v<Scalar>;
  out = v * dy * (power * inverse_root_two_pi) * (Scalar{2} - square);
}

/// The same in float32, in vectors.
struct GeluSecondDerivative {
  using V = Lanes<float>::type;
  typedef std::int32_t I __attribute__((vector_size(64)));  // NOLINT(modernize-use-using)
  static constexpr std::int64_t width = Lanes<float>::count;

  /// exp(z) for z <= 0, within two units in the last place; exp(-87) where z is smaller.
  static MICROREG_ALWAYS_INLINE void exp_of_negative(V& z) {
    const V lowest = V{} - 87.0F;
    z = z < lowest ? lowest : z;
    // z = k log 2 + f with |f| <= log(2) / 2; log 2 in two parts, so that f is exact.
    const V scaled = z * 1.44269504088896341F - 0.5F;
    const I k = __builtin_convertvector(scaled, I);  // Towards zero, which rounds z / log 2 to nearest for z <= 0.
    const V kf = __builtin_convertvector(k, V);
    const V f = (z - kf * 0.693359375F) + kf * 2.12194440e-4F;
    V p = V{} + 1.9875691500e-4F;
    p = p * f + 1.3981999507e-3F;
    p = p * f + 8.3334519073e-3F;
    p = p * f + 4.1665795894e-2F;
    p = p * f + 1.6666665459e-1F;
    p = p * f + 5.0000001201e-1F;
    p = p * f * f + f + 1.0F;
    const I bits = (k + 127) << 23;
    V power;
    std::memcpy(&power, &bits, sizeof(power));
    z = p * power;
  }

  template <class T>
  static MICROREG_ALWAYS_INLINE void run(const T* x, const T* dy, const T* v, T* out, std::int64_t begin,
                                         std::int64_t end) {
    std::int64_t i = begin;
    for (; i + width <= end; i += width) {
      V xs, dys, vs;
      load(xs, x + i);
      load(dys, dy + i);
      load(vs, v + i);
      const V square = xs * xs;
      V phi = square * -0.5F;
      exp_of_negative(phi);
      gelu_second<float>(vs, dys, square, phi, phi);
      store(out + i, phi);
    }
    for (; i < end; ++i) {
      const auto number = static_cast<float>(x[i]);
      const float square = number * number;
      float result;
      gelu_second<float>(static_cast<float>(v[i]), static_cast<float>(dy[i]), square, std::exp(-0.5F * square), result);
      out[i] = static_cast<T>(result);
    }
  }
};

/// v * dy * gelu''(x) from ATen's operations; differentiable.
inline at::Tensor gelu_second_derivative_aten(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& v) {
  const at::Tensor square = x * x;
  at::Tensor out;
  gelu_second<double>(v, dy, square, (square * -0.5).exp(), out);
  return out;
}

inline at::Tensor gelu_second_derivative(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& v) {
  if (!runs_kernels(x) || x.scalar_type() == at::kDouble) {
    return gelu_second_derivative_aten(x, dy, v);
  }
  const at::Tensor xs = x.contiguous(), dys = dy.contiguous(), vs = v.contiguous();
  at::Tensor out = at::empty_like(xs);
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, double>) {
      T* const to = out.mutable_data_ptr<T>();
      parallel_for(0, xs.numel(), 16384, [&](std::int64_t begin, std::int64_t end) {
        run_widest<GeluSecondDerivative>(values_of<T>(xs), values_of<T>(dys), values_of<T>(vs), to, begin, end);
      });
    }
  });
  return out;
}

/// For incoming v: v * gelu'(x) by dy, and v * dy * gelu''(x) by x.
inline constexpr Rule gelu_backward_rule{
    .schema = "aten::gelu_backward(Tensor grad_output, Tensor self, *, str approximate=\"none\") -> Tensor",
    .inputs = {0, 1},
    .saved = {0, 1},
    .derivative = [](const Call& call, const Tensors& upstream, OutputMask needs) -> Tensors {
      at::Tensor dy = call.tensor(0), x = call.tensor(1), v = upstream[0];
      widen_unless_read(runs_kernels(x), {&dy, &x, &v});
      return {needs[0] ? call.with(0, v).with(1, x).run()[0] : at::Tensor(),
              needs[1] ? gelu_second_derivative(x, dy, v) : at::Tensor()};
    },
    .fits = [](const Call& call) { return call.arguments[2].toStringView() == "none"; },
    .halves = HalfTypes::widened_by_formula};

}  // namespace microreg::inline MICROREG_ABI::detail
