/// @file
/// Activations with gates.
#pragma once

#include <ATen/ATen.h>
#include <microreg/detail/finite.hpp>
#include <microreg/detail/libtorch.hpp>
#include <microreg/detail/tensors.hpp>
#include <microreg/gates/history.hpp>
#include <microreg/gates/kinked_operation.hpp>

namespace microreg::inline MICROREG_ABI::detail::gating {

inline Tensors replay_relu(const Arguments& in, const GateTensors& gates) {
  at::Tensor self = in.tensor(0);
  const at::Tensor gate = gates[0].to(self.scalar_type());
  if (!in.in_place() || self.is_view()) {
    return {at::threshold_backward(self, gate, 0)};
  }
  {  // In one sweep.
    const at::NoGradGuard no_grad;
    at::threshold_backward_out(self, self, gate, 0);
  }
  set_gradient(self, self, [gate](const at::Tensor& upstream) { return at::threshold_backward(upstream, gate, 0); });
  return {self};
}

inline at::Tensor replay_leaky(const at::Tensor& self, const at::Tensor& gate, const at::Scalar& slope) {
  return at::leaky_relu_backward(self, gate.to(self.scalar_type()), slope, /*self_is_result=*/false);
}

/// In evaluation mode a leaky_relu whose result is contiguous; in training mode draws.hpp has it, which registers it.
inline Tensors replay_rrelu(const Arguments& in, const GateTensors& gates) {
  return {replay_leaky(in.tensor(0), gates[0], (in.number(2) + in.number(3)) / 2).contiguous()};
}

/// self where `first` was strictly between two bounds, and what the first pass gave elsewhere.
inline at::Tensor replay_between(const at::Tensor& self, const at::Tensor& first, const at::Tensor& first_result,
                                 const at::Scalar& low, const at::Scalar& high) {
  // ATen's fused backward kernels are the fastest way to select, and are differentiable.
  const at::Tensor beyond = first_result - at::hardtanh_backward(first, first, low, high);
  return at::hardtanh_backward(self, first, low, high).add_(beyond);
}

/// elu, and so selu and celu: a linear and an exponential piece, which meet in a kink or in a jump of the curvature.
inline Tensors replay_elu(const at::Tensor& self, const at::Tensor& gate, const at::Scalar& alpha,
                          const at::Scalar& scale, const at::Scalar& input_scale) {
  // The piece that was not taken may overflow: a zero there keeps its gradient from becoming NaN.
  const at::Tensor negative = (self.masked_fill(gate, 0) * input_scale).expm1() * alpha;
  return {at::where(gate, self, negative) * scale};
}

inline GateTensors sign_of(const Arguments& in) { return {in.tensor(0).gt(0)}; }
inline GateTensors sign_if_kept(const Arguments& in) { return {positive_gate(in)}; }
inline GateTensors values(const Arguments& in) { return {value_gate(in)}; }

inline constexpr KinkedOperation kinked_rrelu = {
    "rrelu_with_noise", "Tensor self, Tensor noise, Scalar lower, Scalar upper, bool training, Generator? generator",
    sign_if_kept, nullptr, replay_rrelu};

/// LibTorch's sixth, whatever the type: in the gradient of hardsigmoid, and on CUDA in its value and that of hardswish.
/// A difference of gradients must not see another.
inline constexpr double rounded_sixth = double{1.0F / 6.0F};

inline constexpr KinkedOperation activations[] = {
    {"relu", "Tensor self", nullptr,
     [](const Arguments&, const std::vector<c10::IValue>& results) {
       return GateTensors{positive_gate(results[0].toTensor())};
     },
     replay_relu},
    {"leaky_relu", "Tensor self, Scalar negative_slope", sign_if_kept, nullptr,
     [](const Arguments& in, const GateTensors& gates) {
       return Tensors{replay_leaky(in.tensor(0), gates[0], in.scalar(1))};
     }},
    {"_prelu_kernel", "Tensor self, Tensor weight", sign_if_kept, nullptr,
     [](const Arguments& in, const GateTensors& gates) {
       return Tensors{at::where(gates[0].gt(0), in.tensor(0), in.tensor(0) * in.tensor(1))};
     }},
    {"threshold", "Tensor self, Scalar threshold, Scalar value", values, nullptr,
     [](const Arguments& in, const GateTensors& gates) {
       return Tensors{replay_between(in.tensor(0), gates[0], at::threshold(gates[0], in.scalar(1), in.scalar(2)),
                                     in.scalar(1), unbounded())};
     }},
    // relu6 is one.
    {"hardtanh", "Tensor self, Scalar min_val, Scalar max_val", values, nullptr,
     [](const Arguments& in, const GateTensors& gates) {
       return Tensors{replay_between(in.tensor(0), gates[0], at::hardtanh(gates[0], in.scalar(1), in.scalar(2)),
                                     in.scalar(1), in.scalar(2))};
     }},
    {"hardshrink", "Tensor self, Scalar lambd",
     [](const Arguments& in) {
       return GateTensors{in.tensor(0).ge(-in.scalar(1)).logical_and_(in.tensor(0).le(in.scalar(1)))};
     },
     nullptr,
     [](const Arguments& in, const GateTensors& gates) { return Tensors{in.tensor(0).masked_fill(gates[0], 0)}; }},
    {"softshrink", "Tensor self, Scalar lambd", nullptr,
     [](const Arguments&, const std::vector<c10::IValue>& results) {
       return GateTensors{results[0].toTensor().sign().to(at::kChar)};
     },
     [](const Arguments& in, const GateTensors& gates) {
       const at::Tensor sign = gates[0].to(in.tensor(0).scalar_type());
       return Tensors{in.tensor(0).sub(sign, in.scalar(1)).masked_fill(gates[0].eq(0), 0)};
     }},
    {"hardsigmoid", "Tensor self", values, nullptr,
     [](const Arguments& in, const GateTensors& gates) {
       const at::Tensor result = at::hardtanh_backward(in.tensor(0) * rounded_sixth, gates[0], -3, 3);
       const bool rounded = in.tensor(0).is_cuda();
       const at::Tensor sum = in.tensor(0).detach().add(3);
       const at::Tensor middle = rounded ? sum * rounded_sixth : sum / 6;
       replace_values(
           result,
           at::hardtanh_backward(middle, gates[0], -3, 3).add_(gates[0].ge(3), rounded ? 6 * rounded_sixth : 1.0));
       return Tensors{result};
     }},
    {"hardswish", "Tensor self", values, nullptr,
     [](const Arguments& in, const GateTensors& gates) {
       const at::Tensor self = in.in_place() ? in.tensor(0).clone() : in.tensor(0);  // its gradient needs it
       const auto chosen = [&](const at::Tensor& middle, const at::Tensor& above) {
         if constexpr (hardswish_kinks_vary) {
           const at::Tensor slope = at::hardswish_backward(at::ones_like(gates[0]), gates[0]);
           const at::Tensor none = gates[0].le(-3).logical_and_(slope.eq(0));
           return at::where(gates[0].ge(3).logical_and_(slope.eq(1)), above, middle.masked_fill(none, 0));
         }
         return at::where(gates[0].ge(3), above, at::hardtanh_backward(middle, gates[0], -3, 3));
       };
       const at::Tensor result = chosen(self * (self / 6).add_(0.5), self);
       if (self.is_cuda()) {
         const at::Tensor x = self.detach();
         replace_values(result, chosen(x * x.add(3).mul_(rounded_sixth), x * (6 * rounded_sixth)));
       }
       return Tensors{result};
     }},
    {"elu", "Tensor self, Scalar alpha, Scalar scale, Scalar input_scale", sign_of, nullptr,
     [](const Arguments& in, const GateTensors& gates) {
       return replay_elu(in.tensor(0), gates[0], in.scalar(1), in.scalar(2), in.scalar(3));
     }},
    {"celu", "Tensor self, Scalar alpha", sign_of, nullptr,
     [](const Arguments& in, const GateTensors& gates) {
       // As with the sixth above: LibTorch's gradient divides by alpha in float32, in place by what stands outside of
       // the exponential alone; its value does not.
       const double alpha = in.number(1), rounded = static_cast<float>(alpha);
       Tensors result = in.in_place() ? replay_elu(in.tensor(0), gates[0], alpha * (alpha / rounded), 1, 1 / alpha)
                                      : replay_elu(in.tensor(0), gates[0], alpha, 1, 1 / rounded);
       replace_values(result[0], replay_elu(in.tensor(0).detach(), gates[0], alpha, 1, 1 / alpha)[0]);
       return result;
     }},
};

}  // namespace microreg::inline MICROREG_ABI::detail::gating
