/// @file
/// Code of the user's own that a backward pass runs: functions and hooks.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>
#include <microreg/detail/graph_walk.hpp>
#include <microreg/parameters.hpp>
#include <microreg/version.hpp>

#include <cstddef>
#include <string>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// The nearest of each kind by name, or empty.
struct OwnCode {
  std::string function;   ///< a torch::autograd::Function
  std::string hook;       ///< the parameter or the operation that a hook hangs on
  bool scripted = false;  ///< TorchScript differentiates a part of the graph as one node; no code of the user's

  [[nodiscard]] bool any() const { return !(function.empty() && hook.empty()); }
};

inline OwnCode own_code(const std::vector<at::Tensor>& roots, const Parameters& parameters) {
  OwnCode result;
  for (std::size_t i = 0; i < parameters.tensors.size() && result.hook.empty(); ++i) {
    if (!torch::autograd::impl::hooks(parameters.tensors[i]).empty()) {
      result.hook = parameters.names[i];
    }
  }
  for_each_node(nodes_of(roots), [&](torch::autograd::Node& node, NodeKind kind) {
    if (kind == NodeKind::leaf) {
      return;  // what hangs on its node sees what is added to .grad, not the gradient (and may be ours)
    }
    result.scripted = result.scripted || kind == NodeKind::scripted;
    if (kind == NodeKind::function && result.function.empty()) {
      result.function = node.name();
    }
    if (result.hook.empty() &&
        (!node.tensor_pre_hooks().empty() || !node.pre_hooks().empty() || !node.post_hooks().empty())) {
      result.hook = node.name();
    }
  });
  return result;
}

}  // namespace microreg::inline MICROREG_ABI::detail
