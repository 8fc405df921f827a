/// @file
/// Which operations are fused.
#pragma once

#include <microreg/detail/config.hpp>
#include <microreg/fused/activations.hpp>
#include <microreg/fused/batch_norm.hpp>
#include <microreg/fused/convolution.hpp>
#include <microreg/fused/gelu.hpp>
#include <microreg/fused/group_norm.hpp>
#include <microreg/fused/layer_norm.hpp>
#include <microreg/fused/max_pool.hpp>
#include <microreg/fused/rule.hpp>
#include <microreg/fused/softmax.hpp>
#include <microreg/fused/weight_norm.hpp>

#include <string>
#include <string_view>

namespace microreg::inline MICROREG_ABI::detail {

/// What is intercepted.
inline constexpr const Rule* fused_rules[] = {&convolution_backward_rule,
                                              &native_batch_norm_backward_rule,
                                              &cudnn_batch_norm_backward_rule,
                                              &native_layer_norm_backward_rule,
                                              &native_group_norm_rule,
                                              &threshold_backward_rule,
                                              &hardtanh_backward_rule,
                                              &leaky_relu_backward_rule,
                                              &max_pool2d_backward_rule,
                                              &max_pool3d_backward_rule,
                                              &gelu_backward_rule,
                                              &softmax_backward_rule,
                                              &hardsigmoid_backward_rule,
                                              &weight_norm_rule};

/// The operation of a rule, "aten::name.overload".
inline std::string operation_of(const Rule& rule) {
  const std::string_view schema = rule.schema;
  return std::string(schema.substr(0, schema.find('(')));
}

}  // namespace microreg::inline MICROREG_ABI::detail
