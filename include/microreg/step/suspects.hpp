/// @file
/// What in a loss graph may make a difference disagree with double backward: a guess for an error message.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>
#include <microreg/detail/text.hpp>
#include <microreg/parameters.hpp>

#include <cstdint>
#include <limits>
#include <set>
#include <string>
#include <vector>

namespace microreg::detail {

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
  std::set<const Node*> visited;
  std::vector<Node*> left{loss.grad_fn().get()};
  while (!left.empty()) {
    Node* node = left.back();
    left.pop_back();
    if (node == nullptr || !visited.insert(node).second) {
      continue;
    }
    const std::string name = node->name();
    if (name.find("CppNode") != std::string::npos || name.ends_with("PyNode")) {
      function = name;
    }
    // What hangs on a leaf's node sees what is added to .grad, not the gradient (and may be ours).
    const bool leaf = name.find("AccumulateGrad") != std::string::npos;
    if (!leaf && (!node->tensor_pre_hooks().empty() || !node->pre_hooks().empty() || !node->post_hooks().empty())) {
      hooked = name;
    }
    if (!leaf && node->sequence_nr() < beginning) {
      old = name;
    }
    for (const torch::autograd::Edge& edge : node->next_edges()) {
      left.push_back(edge.function.get());
    }
  }
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

}  // namespace microreg::detail
