/// @file
/// What in a loss graph may make a difference disagree with double backward: a guess for an error message.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>
#include <microreg/detail/graph_walk.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/parameters.hpp>

#include <cstdint>
#include <string>

namespace microreg::inline MICROREG_ABI::detail {

struct Suspects {
  std::string sentence;    ///< empty if there are none
  bool functions = false;  ///< some are functions of the user's own, which may have kinks that nobody sees
};

/// Functions of the user's own, hooks, and nodes that are older than the pass, which began at sequence number
/// `beginning`.
inline Suspects suspects(const at::Tensor& loss, const Parameters& parameters, std::uint64_t beginning) {
  using torch::autograd::Node;
  for (std::size_t i = 0; i < parameters.tensors.size(); ++i) {
    if (!torch::autograd::impl::hooks(parameters.tensors[i]).empty()) {
      return {text({"there is a hook on ", parameters.names[i],
                    ", which a difference applies to each of its gradients: apply it to .grad after the step"}),
              false};
    }
  }
  std::string function;
  std::string hooked;
  std::string old;
  for_each_node(nodes_of({loss}), [&](Node& node, NodeKind kind) {
    if (kind == NodeKind::leaf) {
      return;  // what hangs on its node sees what is added to .grad, not the gradient (and may be ours)
    }
    if (kind == NodeKind::function) {
      function = node.name();
    }
    if (!node.tensor_pre_hooks().empty() || !node.pre_hooks().empty() || !node.post_hooks().empty()) {
      hooked = node.name();
    }
    if (node.sequence_nr() < beginning) {
      old = node.name();
    }
  });
  if (!old.empty()) {
    return {text({"the graph has nodes that are older than the pass (", old,
                  "): weights that were made from parameters once, outside of forward(), do not move with them; make "
                  "them in each pass"}),
            !function.empty()};
  }
  if (!function.empty()) {
    return {text({"there is a function of one's own, ", function,
                  ", whose backward decides for itself, or is not the derivative of its forward"}),
            true};
  }
  if (!hooked.empty()) {
    return {text({"there is a hook at ", hooked, ", which changes gradients"}), false};
  }
  return {};
}

}  // namespace microreg::inline MICROREG_ABI::detail
