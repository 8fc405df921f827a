/// @file
/// What enters a graph without one, and what projects parameters: to double backward the one is a constant and the
/// other has happened, however they were made. A second pass gets those of the first.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/List.h>
#include <microreg/detail/version_of.hpp>
#include <microreg/gates/kernel.hpp>
#include <microreg/gates/schema.hpp>
#include <microreg/gates/tape.hpp>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail::gating {

/// Their operands without a graph are kept: factors and summands (a mask, a teacher's output, whatever was computed
/// under NoGradGuard or through data_ptr), targets, choices and indices. Not those of products of a matrix with a
/// batch, where a frozen network's weights would be copied.
inline constexpr Operations with_constants[] = {{"... -> Tensor, ...",
                                                 {"mul.Tensor",
                                                  "div.Tensor",
                                                  "add.Tensor",
                                                  "sub.Tensor",
                                                  "addcmul",
                                                  "addcdiv",
                                                  "lerp.Scalar",
                                                  "lerp.Tensor",
                                                  "bmm",
                                                  "baddbmm",
                                                  "_scaled_dot_product_flash_attention_for_cpu",
                                                  "mse_loss",
                                                  "binary_cross_entropy",
                                                  "binary_cross_entropy_with_logits",
                                                  "nll_loss_forward",
                                                  "nll_loss2d_forward",
                                                  "where.self",
                                                  "masked_fill.Scalar",
                                                  "masked_fill.Tensor",
                                                  "masked_scatter",
                                                  "masked_select",
                                                  "index.Tensor",
                                                  "index_put",
                                                  "index_select",
                                                  "index_add",
                                                  "index_copy",
                                                  "index_fill.int_Scalar",
                                                  "index_fill.int_Tensor",
                                                  "gather",
                                                  "scatter.src",
                                                  "scatter.value",
                                                  "scatter_add",
                                                  "take",
                                                  "embedding"}}};

/// Calls `visit(tensor)` for each operand without a graph, and puts what that returns in its place, if it returns
/// something. What an operation in place writes to is none.
template <class Visit>
void for_each_constant(InterceptedCall& call, const Visit& visit) {
  const auto visited = [&](const at::Tensor& tensor) -> std::optional<at::Tensor> {
    const bool constant =
        tensor.defined() && !tensor.requires_grad() && !tensor.unsafeGetTensorImpl()->is_wrapped_number();
    return constant ? visit(tensor) : std::nullopt;
  };
  const std::vector<c10::IValue>& values = call.in.values();
  for (std::size_t i = call.in.in_place() ? 1 : 0; i < values.size(); ++i) {
    if (values[i].isTensor()) {
      if (auto other = visited(values[i].toTensor())) {
        call.replace(i, std::move(*other));
      }
    } else if (values[i].isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list = values[i].toOptionalTensorList().copy();
      for (std::size_t k = 0; k < list.size(); ++k) {
        const std::optional<at::Tensor> tensor = list.get(k);
        if (auto other = visited(tensor.value_or(at::Tensor()))) {
          list.set(k, std::move(*other));
        }
      }
      call.replace(i, std::move(list));
    }
  }
}

/// A gate for each of them: a copy, or nothing where the values are drawn or decided, and given again anyway.
inline void hold_constants(InterceptedCall& call) {
  if (!call.session.holds_constants() || !at::GradMode::is_enabled() || !call.in.requires_grad()) {
    return call.stock();
  }
  GateTensors constants;
  {
    const StockKernels exclude;
    for_each_constant(call, [&](const at::Tensor& tensor) -> std::optional<at::Tensor> {
      const bool copies = !call.session.replays() && !call.session.reproduces(tensor);
      constants.push_back(copies ? tensor.clone() : at::Tensor());
      return std::nullopt;
    });
  }
  if (constants.empty()) {
    return call.stock();
  }
  if (!call.session.replays()) {
    call.stock();
    return call.record(std::move(constants), /*may_be_left_out=*/false);
  }
  const GateTensors held = call.next();
  if (held.size() != constants.size()) {
    call.session.fail(call.in.operation(), call.in.sizes());
  }
  std::size_t next = 0;
  for_each_constant(call, [&](const at::Tensor& /*tensor*/) {
    const at::Tensor& kept = held[next++];
    return kept.defined() ? std::optional(kept) : std::nullopt;
  });
  call.stock();
}

inline constexpr Operations projections[] = {{"Tensor self, ...", {"embedding_renorm_"}}};

/// An Embedding's max_norm projects rows of its weight before it looks them up. A further pass would undo a
/// displacement by that, where double backward takes the projected rows for what they are.
inline void project_once(InterceptedCall& call) {
  if (!call.session.holds_draws()) {
    return call.stock();
  }
  const at::Tensor weight = call.in.tensor(0);
  if (call.session.replays()) {
    call.next();
    return call.give({weight});
  }
  const std::uint64_t before = version_of(weight);
  call.stock();
  call.session.record({call.in.operation(),
                       call.in.sizes(),
                       {at::empty({0})},
                       {},
                       /*may_be_left_out=*/false,
                       weight.unsafeGetTensorImpl(),
                       version_of(weight) - before,
                       /*drawn=*/true});
}

}  // namespace microreg::inline MICROREG_ABI::detail::gating

namespace microreg::inline MICROREG_ABI::detail {

/// How far such projections have moved the version of `parameter` in the pass that `tape` is of.
inline std::uint64_t projections_of(const at::Tensor& parameter, const GateTape& tape) {
  std::uint64_t result = 0;
  for (const GateTape::Entry& entry : tape.entries()) {
    if (entry.node == parameter.unsafeGetTensorImpl() && std::string_view(entry.operation) == "embedding_renorm_") {
      result += entry.sequence_number;
    }
  }
  return result;
}

}  // namespace microreg::inline MICROREG_ABI::detail
