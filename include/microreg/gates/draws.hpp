/// @file
/// Operations that draw random numbers. A second pass gets those of the first, and the generators, which other threads
/// draw from too, are left alone.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <microreg/gates/activations.hpp>
#include <microreg/gates/history.hpp>
#include <microreg/gates/kernel.hpp>
#include <microreg/gates/kinked_operation.hpp>
#include <microreg/gates/schema.hpp>

#include <mutex>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail::gating {

/// Their results are constants to double backward. What rand, randn, randint and dropout draw they draw by the next
/// list.
inline constexpr Operations drawn_results[] = {
    {"... -> Tensor",
     {"bernoulli", "bernoulli.p", "multinomial", "poisson", "binomial", "normal.Tensor_float", "normal.float_Tensor",
      "normal.Tensor_Tensor", "randperm", "randperm.generator"}}};

inline constexpr Operations drawn_in_place[] = {
    {"Tensor self, ...",
     {"bernoulli_.Tensor", "bernoulli_.float", "normal_", "uniform_", "random_", "random_.from", "random_.to",
      "exponential_", "geometric_", "cauchy_", "log_normal_"}}};

/// What they draw stays inside, or moves with their operands: they draw again, from the generator's state of then,
/// which is the one that others see for the length of this one operation.
inline constexpr Operations drawn_inside[] = {
    {"Tensor self, Generator? generator", {"_standard_gamma", "_sample_dirichlet"}},
    {"..., float dropout_p, ... -> Tensor, ...",
     {"_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
      "_scaled_dot_product_cudnn_attention", "_flash_attention_forward", "_efficient_attention_forward"}},
};

inline constexpr Operations dropouts[] = {{"Tensor input, float p, bool? train -> Tensor, Tensor", {"native_dropout"}}};
inline constexpr Operations rrelus[] = {{kinked_rrelu.schema, {"rrelu_with_noise", "rrelu_with_noise_"}}};

/// Draws need not be repeated: labels and masks are sometimes drawn once and kept.
inline std::optional<GateTensors> drawn(InterceptedCall& call) {
  return call.session.next_if_there(call.in.operation(), call.in.sizes());
}

inline void draw(InterceptedCall& call) {
  if (!call.session.replays()) {
    call.stock();
    const StockKernels exclude;
    const at::Tensor values = call.results().front().toTensor();
    call.session.reproduced(values);
    return call.record({values.detach().clone()}, /*may_be_left_out=*/true, /*drawn=*/true);
  }
  const auto values = drawn(call);
  if (!values) {
    return call.stock();
  }
  const StockKernels exclude;
  const at::Tensor again = values->front().clone();
  call.session.reproduced(again);
  call.give({again});
}

inline void draw_in_place(InterceptedCall& call) {
  if (!call.session.holds_draws()) {
    return call.stock();
  }
  if (!call.session.replays()) {
    call.stock();
    const StockKernels exclude;
    const at::Tensor values = call.results().front().toTensor().detach();
    call.session.reproduced(values);
    // A byte an element for the masks of dropout.
    const bool is_mask = std::string_view(call.in.operation()) == "bernoulli_";
    return call.record({is_mask ? values.to(at::kBool) : values.clone()}, /*may_be_left_out=*/true, /*drawn=*/true);
  }
  const auto values = drawn(call);
  if (!values) {
    return call.stock();
  }
  const StockKernels exclude;
  const at::Tensor self = call.in.tensor(0);
  self.copy_(values->front());
  call.session.reproduced(self);
  call.give({self});
}

/// dropout of the devices that have it as one operation: result and mask.
inline void native_dropout(InterceptedCall& call) {
  if (!call.session.holds_draws()) {
    return call.stock();
  }
  const c10::IValue& train = call.in.values()[2];
  if (!train.isNone() && !train.toBool()) {
    return call.stock();
  }
  if (!call.session.replays()) {
    call.stock();
    const StockKernels exclude;
    return call.record({call.results()[1].toTensor().detach()}, /*may_be_left_out=*/false, /*drawn=*/true);
  }
  const at::Tensor mask = call.next().front();
  const StockKernels exclude;
  const double p = call.in.number(1);
  const at::Tensor self = call.in.tensor(0);
  call.give({self * mask.to(self.scalar_type()) * (p < 1 ? 1 / (1 - p) : 0.0), mask.clone()});
}

/// rrelu's slopes, which are 1 where its operand is positive: decisions and draws are one tensor.
inline void rrelu(InterceptedCall& call) {
  if (!call.in.flag(4)) {
    return call.session.holds_decisions() && gates_are_active() && has_gates(call.in) ? freeze(kinked_rrelu, call)
                                                                                      : call.stock();
  }
  if (!call.session.replays()) {
    call.stock();
    return call.record({call.in.tensor(1).detach()}, /*may_be_left_out=*/false, /*drawn=*/true);
  }
  const at::Tensor slopes = call.next().front();
  const StockKernels exclude;
  at::Tensor noise = call.in.tensor(1);
  replace_values(noise, slopes);
  const at::Tensor self = call.in.tensor(0);
  const at::Tensor result = (self * slopes).contiguous();  // as LibTorch's
  if (call.in.in_place()) {
    write_back(self, result);
    return call.give({self});
  }
  call.give({result});
}

/// The generator that a call draws from.
inline at::Generator generator_of(const InterceptedCall& call) {
  if (const auto position = call.in.find("generator"); position && call.in.values()[*position].isGenerator()) {
    return call.in.values()[*position].toGenerator();
  }
  const auto& values = call.in.values();
  for (const c10::IValue& value : values) {
    if (value.isTensor() && value.toTensor().defined()) {
      return at::globalContext().defaultGenerator(value.toTensor().device());
    }
  }
  return at::globalContext().defaultGenerator(at::kCPU);
}

inline at::Tensor exchange_state(at::Generator generator, const std::optional<at::Tensor>& state) {
  const std::scoped_lock lock(generator.mutex());
  at::Tensor before = generator.get_state();
  if (state) {
    generator.set_state(*state);
  }
  return before;
}

inline void draw_inside(InterceptedCall& call) {
  if (!call.session.holds_draws()) {
    return call.stock();
  }
  const auto dropout = call.in.find("dropout_p");
  if (dropout && call.in.number(*dropout) == 0) {
    return call.stock();
  }
  const at::Generator generator = generator_of(call);
  if (!call.session.replays()) {
    at::Tensor state = exchange_state(generator, std::nullopt);
    call.stock();
    return call.record({std::move(state)}, /*may_be_left_out=*/true, /*drawn=*/true);
  }
  const auto state = drawn(call);
  if (!state) {
    return call.stock();
  }
  const at::Tensor now = exchange_state(generator, state->front());
  try {
    call.stock();
  } catch (...) {
    exchange_state(generator, now);
    throw;
  }
  exchange_state(generator, now);
}

}  // namespace microreg::inline MICROREG_ABI::detail::gating
