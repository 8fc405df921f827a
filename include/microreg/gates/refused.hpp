/// @file
/// Operations with a kink that has no gate: said by name, rather than left free.
#pragma once

#include <ATen/ATen.h>
#include <microreg/gates/kernel.hpp>
#include <microreg/gates/losses.hpp>

#include <string>

namespace microreg::inline MICROREG_ABI::detail::gating {

struct Refused {
  const char* operation;
  /// Whether there is a kink with these arguments; always, if null.
  bool (*has_kink)(const Arguments&) = nullptr;
  const char* schema = "... -> ...";  ///< as is_known() has it: what has_kink reads
};

inline bool grid_moves(const Arguments& in) { return in.tensor(*in.find("grid")).requires_grad(); }
inline bool takes_maximum(const Arguments& in) { return in.integer(*in.find("mode")) == 2; }
inline bool is_relu_network(const Arguments& in) { return in.integer(*in.find("mode")) == 0; }

inline constexpr Refused refused[] = {
    {"grid_sampler_2d", grid_moves, "..., Tensor grid, ..."},
    {"grid_sampler_3d", grid_moves, "..., Tensor grid, ..."},
    {"_grid_sampler_2d_cpu_fallback", grid_moves, "..., Tensor grid, ..."},
    {"cudnn_grid_sampler", grid_moves, "..., Tensor grid, ..."},
    {"_embedding_bag", takes_maximum, "..., int mode, ... -> ..."},
    {"_cudnn_rnn", is_relu_network, "..., int mode, ... -> ..."},
    {"miopen_rnn", is_relu_network, "..., int mode, ... -> ..."},
    {"segment_reduce", [](const Arguments& in) { return in.text(1) == "max" || in.text(1) == "min"; },
     "Tensor data, str reduce, ..."},
    {"renorm"},
    {"frexp.Tensor"},
    {"mkldnn_max_pool2d"},
    {"mkldnn_max_pool3d"},
    {"_fake_quantize_learnable_per_tensor_affine"},
    {"_fake_quantize_learnable_per_channel_affine"},
    {"_fake_quantize_per_tensor_affine_cachemask_tensor_qparams"},
    {"_fused_moving_avg_obs_fq_helper"},
    {"_foreach_abs"},
    {"_foreach_sign"},
    {"_foreach_round"},
    {"_foreach_floor"},
    {"_foreach_ceil"},
    {"_foreach_trunc"},
    {"_foreach_frac"},
    {"_foreach_clamp_min.Scalar"},
    {"_foreach_clamp_min.List"},
    {"_foreach_clamp_min.ScalarList"},
    {"_foreach_clamp_max.Scalar"},
    {"_foreach_clamp_max.List"},
    {"_foreach_clamp_max.ScalarList"},
    {"_foreach_maximum.Scalar"},
    {"_foreach_maximum.List"},
    {"_foreach_maximum.ScalarList"},
    {"_foreach_minimum.Scalar"},
    {"_foreach_minimum.List"},
    {"_foreach_minimum.ScalarList"},
    {"_foreach_norm.Scalar", has_kink_of_order, "..., Scalar ord, ... -> ..."},
};

inline void refuse(const Refused& operation, InterceptedCall& call) {
  if (at::GradMode::is_enabled() && call.in.requires_grad() &&
      (operation.has_kink == nullptr || operation.has_kink(call.in))) {
    throw GateError(std::string(call.in.operation()) +
                    " has a kink that cannot be frozen; choose Exact, or .gates = Gates::free");
  }
  call.stock();
}

}  // namespace microreg::inline MICROREG_ABI::detail::gating
