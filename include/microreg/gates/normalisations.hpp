/// @file
/// Normalisation over few elements: nothing to freeze, but a difference in float32 has to know of it.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/util/accumulate.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/interception.hpp>
#include <microreg/gates/kernel.hpp>
#include <microreg/gates/tape.hpp>

#include <cstdint>

namespace microreg::inline MICROREG_ABI::detail::gating {

/// How many elements an operation normalises together, with these arguments; 0 where there are none, or statistics are
/// taken from elsewhere.
struct Normalisation {
  const char* operation;
  const char* schema;  ///< as is_known() has it
  std::int64_t (*elements)(const Arguments& in);
};

inline constexpr Normalisation normalisations[] = {
    {"batch_norm",
     "Tensor input, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, bool training, ...",
     [](const Arguments& in) -> std::int64_t {
       const at::Tensor& x = in.tensor(0);
       return in.flag(5) && x.dim() > 1 && x.size(1) > 0 ? x.numel() / x.size(1) : 0;
     }},
    {"instance_norm",
     "Tensor input, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, bool use_input_stats, ...",
     [](const Arguments& in) -> std::int64_t {
       const at::Tensor& x = in.tensor(0);
       const std::int64_t rows = x.dim() > 1 ? x.size(0) * x.size(1) : 0;
       return in.flag(5) && rows > 0 ? x.numel() / rows : 0;
     }},
    {"layer_norm", "Tensor input, int[] normalized_shape, ...",
     [](const Arguments& in) { return c10::multiply_integers(in.integers(1)); }},
    {"rms_norm", "Tensor input, int[] normalized_shape, ...",
     [](const Arguments& in) { return c10::multiply_integers(in.integers(1)); }},
    {"group_norm", "Tensor input, int num_groups, ...",
     [](const Arguments& in) -> std::int64_t {
       const at::Tensor& x = in.tensor(0);
       const std::int64_t rows = x.dim() > 1 ? x.size(0) * in.integer(1) : 0;
       return rows > 0 ? x.numel() / rows : 0;
     }},
};

/// One of them. LibTorch composes them of others, which are intercepted as if this one were not.
class NormalisationKernel final : public c10::OperatorKernel {
 public:
  explicit NormalisationKernel(const Normalisation& normalisation) : normalisation_(normalisation) {}

  void operator()(const c10::OperatorHandle& operation, c10::DispatchKeySet keys, torch::jit::Stack* stack) const {
    if (gates_are_active() && !active_gate_session->replays()) {
      const Arguments in(operation.schema(), *stack);
      const bool coarse = has_gates(in) && in.tensor(0).scalar_type() != at::kDouble;
      if (const std::int64_t elements = coarse ? normalisation_.elements(in) : 0; elements > 0) {
        active_gate_session->normalised(elements);
      }
    }
    operation.redispatchBoxed(keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, interception_key), stack);
  }

 private:
  const Normalisation& normalisation_;
};

}  // namespace microreg::inline MICROREG_ABI::detail::gating
