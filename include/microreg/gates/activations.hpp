/// @file
/// Activations with gates.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <microreg/gates/kernel.hpp>

#include <limits>
#include <optional>
#include <tuple>

namespace microreg::detail {

// relu: on where the first output was positive.

/// relu_ with the gates of the first pass.
struct ReplayReluInPlace : torch::autograd::Function<ReplayReluInPlace> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, at::Tensor self, const at::Tensor& gate) {
    context->mark_dirty({self});
    context->save_for_backward({gate});
    at::threshold_backward_out(self, self, gate, 0);
    return self;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list upstream) {
    return {at::threshold_backward(upstream[0], context->get_saved_variables()[0], 0), at::Tensor()};
  }
};

inline at::Tensor relu_kernel(const at::Tensor& self) {
  return gated(
      "relu", {&self}, [&] { return at::relu(self); },
      [](const at::Tensor& result) { return Gates{positive_gate(result)}; },
      [&](const Gates& gates) { return at::threshold_backward(self, gates[0].to(self.scalar_type()), 0); });
}

inline at::Tensor& relu_in_place_kernel(at::Tensor& self) {
  return gated(
      "relu_", {&self}, [&]() -> at::Tensor& { return at::relu_(self); },
      [](const at::Tensor& result) { return Gates{positive_gate(result)}; },
      [&](const Gates& gates) -> at::Tensor& {
        ReplayReluInPlace::apply(self, gates[0].to(self.scalar_type()));
        return self;
      });
}

// leaky_relu, and rrelu, which is the same with another slope in evaluation mode and slopes drawn in training mode.

inline at::Tensor replay_leaky(const at::Tensor& self, const at::Tensor& gate, const at::Scalar& slope) {
  return at::leaky_relu_backward(self, gate.to(self.scalar_type()), slope, /*self_is_result=*/false);
}

inline at::Tensor leaky_relu_kernel(const at::Tensor& self, const at::Scalar& slope) {
  return gated(
      "leaky_relu", {&self}, [&] { return at::leaky_relu(self, slope); }, [&] { return Gates{positive_gate(self)}; },
      [&](const Gates& gates) { return replay_leaky(self, gates[0], slope); });
}

inline at::Tensor& leaky_relu_in_place_kernel(at::Tensor& self, const at::Scalar& slope) {
  return gated(
      "leaky_relu_", {&self}, [&]() -> at::Tensor& { return at::leaky_relu_(self, slope); },
      [&] { return Gates{self.gt(0)}; },
      [&](const Gates& gates) -> at::Tensor& { return overwrite(self, replay_leaky(self, gates[0], slope)); });
}

/// Draws the noise that the first pass drew if the generator is where it was then, and leaves it where the first pass
/// left it: it draws for the elements that were not positive.
inline at::Tensor replay_rrelu(const at::Tensor& self, const at::Tensor& gate, at::Tensor& noise,
                               const at::Scalar& lower, const at::Scalar& upper, bool training,
                               const std::optional<at::Generator>& generator) {
  if (!training) {
    return replay_leaky(self, gate, (lower.toDouble() + upper.toDouble()) / 2);
  }
  const at::Tensor sign = gate.gt(0).to(self.scalar_type()).mul_(2).sub_(1);
  at::rrelu_with_noise(sign, noise, lower, upper, training, generator);
  return self * noise;
}

inline at::Tensor rrelu_kernel(const at::Tensor& self, at::Tensor& noise, const at::Scalar& lower,
                               const at::Scalar& upper, bool training, std::optional<at::Generator> generator) {
  return gated(
      "rrelu_with_noise", {&self}, [&] { return at::rrelu_with_noise(self, noise, lower, upper, training, generator); },
      [&] { return Gates{positive_gate(self)}; },
      [&](const Gates& gates) { return replay_rrelu(self, gates[0], noise, lower, upper, training, generator); });
}

inline at::Tensor& rrelu_in_place_kernel(at::Tensor& self, at::Tensor& noise, const at::Scalar& lower,
                                         const at::Scalar& upper, bool training,
                                         std::optional<at::Generator> generator) {
  return gated(
      "rrelu_with_noise_", {&self},
      [&]() -> at::Tensor& { return at::rrelu_with_noise_(self, noise, lower, upper, training, generator); },
      [&] { return Gates{self.gt(0)}; },
      [&](const Gates& gates) -> at::Tensor& {
        return overwrite(self, replay_rrelu(self, gates[0], noise, lower, upper, training, generator));
      });
}

/// prelu with the gates of the first input. LibTorch's backward selects as the forward does.
struct ReplayPrelu : torch::autograd::Function<ReplayPrelu> {
  static at::Tensor select(const at::Tensor& value, const at::Tensor& first, const at::Tensor& weight) {
    return std::get<0>(at::_prelu_kernel_backward(value, first, weight));
  }
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& self, const at::Tensor& weight,
                            const at::Tensor& first) {
    context->save_for_backward({self, weight, first});
    return select(self, first, weight);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list upstream) {
    const auto saved = context->get_saved_variables();
    at::Tensor d_self;
    at::Tensor d_weight;
    if (context->needs_input_grad(0)) {
      d_self = select(upstream[0], saved[2], saved[1]);
    }
    if (context->needs_input_grad(1)) {
      d_weight = (upstream[0] * saved[0]).masked_fill(saved[2].gt(0), 0).sum_to_size(saved[1].sizes());
    }
    return {d_self, d_weight, at::Tensor()};
  }
};

inline at::Tensor prelu_kernel(const at::Tensor& self, const at::Tensor& weight) {
  return gated(
      "_prelu_kernel", {&self, &weight}, [&] { return at::_prelu_kernel(self, weight); },
      [&] { return Gates{positive_gate(self)}; },
      [&](const Gates& gates) -> at::Tensor {
        return ReplayPrelu::apply(self, weight, gates[0].to(self.scalar_type()));
      });
}

// threshold and hardtanh: the identity but for pieces where they are constant.

inline at::Tensor replay_threshold(const at::Tensor& self, const at::Tensor& first, const at::Scalar& threshold,
                                   const at::Scalar& value) {
  return replay_between(self, first, at::threshold(first, threshold, value), threshold,
                        std::numeric_limits<double>::infinity());
}

inline at::Tensor threshold_kernel(const at::Tensor& self, const at::Scalar& threshold, const at::Scalar& value) {
  return gated(
      "threshold", {&self}, [&] { return at::threshold(self, threshold, value); },
      [&] { return Gates{value_gate(self)}; },
      [&](const Gates& gates) { return replay_threshold(self, gates[0], threshold, value); });
}

inline at::Tensor& threshold_in_place_kernel(at::Tensor& self, const at::Scalar& threshold, const at::Scalar& value) {
  return gated(
      "threshold_", {&self}, [&]() -> at::Tensor& { return at::threshold_(self, threshold, value); },
      [&] { return Gates{overwritten_gate(self)}; },
      [&](const Gates& gates) -> at::Tensor& {
        return overwrite(self, replay_threshold(self, gates[0], threshold, value));
      });
}

/// relu6 is a hardtanh. `first` may be the first input or the first result.
inline at::Tensor replay_hardtanh(const at::Tensor& self, const at::Tensor& first, const at::Scalar& low,
                                  const at::Scalar& high) {
  return replay_between(self, first, at::hardtanh(first, low, high), low, high);
}

inline at::Tensor hardtanh_kernel(const at::Tensor& self, const at::Scalar& low, const at::Scalar& high) {
  return gated(
      "hardtanh", {&self}, [&] { return at::hardtanh(self, low, high); }, [&] { return Gates{value_gate(self)}; },
      [&](const Gates& gates) { return replay_hardtanh(self, gates[0], low, high); });
}

inline at::Tensor& hardtanh_in_place_kernel(at::Tensor& self, const at::Scalar& low, const at::Scalar& high) {
  return gated(
      "hardtanh_", {&self}, [&]() -> at::Tensor& { return at::hardtanh_(self, low, high); },
      [](const at::Tensor& result) { return Gates{value_gate(result)}; },
      [&](const Gates& gates) -> at::Tensor& { return overwrite(self, replay_hardtanh(self, gates[0], low, high)); });
}

// hardshrink and softshrink.

inline at::Tensor hardshrink_kernel(const at::Tensor& self, const at::Scalar& lambda) {
  return gated(
      "hardshrink", {&self}, [&] { return at::hardshrink(self, lambda); },
      [&] { return Gates{self.ge(-lambda).logical_and_(self.le(lambda))}; },
      [&](const Gates& gates) { return self.masked_fill(gates[0], 0); });
}

inline at::Tensor softshrink_kernel(const at::Tensor& self, const at::Scalar& lambda) {
  return gated(
      "softshrink", {&self}, [&] { return at::softshrink(self, lambda); },
      [](const at::Tensor& result) { return Gates{result.sign().to(at::kChar)}; },
      [&](const Gates& gates) {
        const at::Tensor sign = gates[0].to(self.scalar_type());
        return self.sub(sign, lambda).masked_fill(gates[0].eq(0), 0);
      });
}

// hardsigmoid and hardswish: three pieces, the middle one a function of the second pass's input.

/// value where `first` was between -3 and 3, 0 below and 1 above.
inline at::Tensor replay_ramp(const at::Tensor& value, const at::Tensor& first) {
  return at::hardtanh_backward(value, first, -3, 3).add_(first.ge(3));
}

/// Its gradient is LibTorch's, whose sixth is a float32 one: a difference of gradients must not see another.
struct ReplayHardsigmoid : torch::autograd::Function<ReplayHardsigmoid> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& self,
                            const at::Tensor& first) {
    context->save_for_backward({first});
    return replay_ramp(self.add(3).div_(6), first);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list upstream) {
    return {at::hardsigmoid_backward(upstream[0], context->get_saved_variables()[0]), at::Tensor()};
  }
};

struct ReplayHardswish : torch::autograd::Function<ReplayHardswish> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& self,
                            const at::Tensor& first) {
    context->save_for_backward({self, first});
    return replay_ramp(self.add(3).div_(6), first).mul_(self);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list upstream) {
    const auto saved = context->get_saved_variables();
    return {replay_ramp(saved[0].div(3).add_(0.5), saved[1]).mul(upstream[0]), at::Tensor()};
  }
};

inline at::Tensor hardsigmoid_kernel(const at::Tensor& self) {
  return gated(
      "hardsigmoid", {&self}, [&] { return at::hardsigmoid(self); }, [&] { return Gates{value_gate(self)}; },
      [&](const Gates& gates) -> at::Tensor { return ReplayHardsigmoid::apply(self, gates[0]); });
}

inline at::Tensor& hardsigmoid_in_place_kernel(at::Tensor& self) {
  return gated(
      "hardsigmoid_", {&self}, [&]() -> at::Tensor& { return at::hardsigmoid_(self); },
      [&] { return Gates{overwritten_gate(self)}; },
      [&](const Gates& gates) -> at::Tensor& { return overwrite(self, ReplayHardsigmoid::apply(self, gates[0])); });
}

inline at::Tensor hardswish_kernel(const at::Tensor& self) {
  return gated(
      "hardswish", {&self}, [&] { return at::hardswish(self); }, [&] { return Gates{value_gate(self)}; },
      [&](const Gates& gates) -> at::Tensor { return ReplayHardswish::apply(self, gates[0]); });
}

inline at::Tensor& hardswish_in_place_kernel(at::Tensor& self) {
  return gated(
      "hardswish_", {&self}, [&]() -> at::Tensor& { return at::hardswish_(self); },
      [&] { return Gates{overwritten_gate(self)}; },
      // The gradient needs the input, which must not be overwritten.
      [&](const Gates& gates) -> at::Tensor& {
        return overwrite(self, ReplayHardswish::apply(self.clone(), gates[0]));
      });
}

// elu, and so selu: a linear and an exponential piece, which meet in a kink unless alpha times input_scale is 1.

inline at::Tensor replay_elu(const at::Tensor& self, const at::Tensor& gate, const at::Scalar& alpha,
                             const at::Scalar& scale, const at::Scalar& input_scale) {
  // The piece that was not taken may overflow: a zero there keeps its gradient from becoming NaN.
  const at::Tensor negative = (self.masked_fill(gate, 0) * input_scale).expm1() * alpha;
  return at::where(gate, self, negative) * scale;
}

inline at::Tensor elu_kernel(const at::Tensor& self, const at::Scalar& alpha, const at::Scalar& scale,
                             const at::Scalar& input_scale) {
  return gated(
      "elu", {&self}, [&] { return at::elu(self, alpha, scale, input_scale); }, [&] { return Gates{self.gt(0)}; },
      [&](const Gates& gates) { return replay_elu(self, gates[0], alpha, scale, input_scale); });
}

inline at::Tensor& elu_in_place_kernel(at::Tensor& self, const at::Scalar& alpha, const at::Scalar& scale,
                                       const at::Scalar& input_scale) {
  return gated(
      "elu_", {&self}, [&]() -> at::Tensor& { return at::elu_(self, alpha, scale, input_scale); },
      [&] { return Gates{self.gt(0)}; },
      [&](const Gates& gates) -> at::Tensor& {
        return overwrite(self, replay_elu(self, gates[0], alpha, scale, input_scale));
      });
}

}  // namespace microreg::detail
