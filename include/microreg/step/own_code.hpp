/// @file
/// Code of the user's own that a backward pass runs: functions and hooks.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>
#include <microreg/detail/graph_walk.hpp>
#include <microreg/parameters.hpp>
#include <microreg/version.hpp>

#include <string>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// One of each kind by name, or empty.
struct OwnCode {
  std::string hooked_parameter;
  std::string function;     ///< a torch::autograd::Function
  std::string hooked_node;  ///< with a hook on it, or on the tensor that comes in

  [[nodiscard]] bool any() const { return !(hooked_parameter.empty() && function.empty() && hooked_node.empty()); }
};

inline OwnCode own_code(const std::vector<at::Tensor>& roots, const Parameters& parameters) {
  OwnCode result;
  for (std::size_t i = 0; i < parameters.tensors.size(); ++i) {
    if (!torch::autograd::impl::hooks(parameters.tensors[i]).empty()) {
      result.hooked_parameter = parameters.names[i];
      break;
    }
  }
  for_each_node(nodes_of(roots), [&](torch::autograd::Node& node, NodeKind kind) {
    if (kind == NodeKind::leaf) {
      return;  // what hangs on its node sees what is added to .grad, not the gradient (and may be ours)
    }
    if (kind == NodeKind::function) {
      result.function = node.name();
    }
    if (!node.tensor_pre_hooks().empty() || !node.pre_hooks().empty() || !node.post_hooks().empty()) {
      result.hooked_node = node.name();
    }
  });
  return result;
}

}  // namespace microreg::inline MICROREG_ABI::detail
