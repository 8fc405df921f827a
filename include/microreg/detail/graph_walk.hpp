/// @file
/// Every node of an autograd graph, and what kind it is.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/tensor.h>
#include <microreg/detail/config.hpp>
#include <microreg/version.hpp>

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>
#include <typeinfo>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

enum class NodeKind {
  plain,
  leaf,           ///< AccumulateGrad
  function,       ///< a torch::autograd::Function or a node of the user's own, which does what its author likes
  scripted,       ///< a part of a graph that TorchScript differentiates as one
  weight_norm,    ///< its second derivative holds the norms constant
  norm_backward,  ///< of layer or batch normalisation, whose own second derivative holds the statistics constant
  copy_slices,    ///< an operation in place on a view; it is a node of its own inside
};

inline NodeKind kind_by_name(const torch::autograd::Node& node) {
  if (dynamic_cast<const torch::autograd::AccumulateGrad*>(&node) != nullptr) {
    return NodeKind::leaf;
  }
  if (dynamic_cast<const torch::autograd::CopySlices*>(&node) != nullptr) {
    return NodeKind::copy_slices;
  }
  const std::string name = node.name();
  const auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
  if (has("WeightNormInterface")) {
    return NodeKind::weight_norm;
  }
  if (has("NormBackwardBackward") && (has("Batch") || has("Layer"))) {
    return NodeKind::norm_backward;
  }
  // Types as compilers mangle them: LibTorch's own nodes and ours are in its namespace, or inside of a function there.
  const std::string_view type = typeid(node).name();
  const auto holds = [&](const char* part) { return type.find(part) != std::string_view::npos; };
  const auto of = [&](const char* space) { return type.starts_with(space) || type.substr(1).starts_with(space); };
  if (holds("DifferentiableGraph")) {
    return NodeKind::scripted;
  }
  const bool written_by_user = (holds("7CppNodeI") && !holds("7CppNodeIN8microreg")) || holds("6PyNode");
  return !written_by_user && (of("N5torch") || of("N8microreg")) ? NodeKind::plain : NodeKind::function;
}

/// Asked by name once for each type of node, since names are made anew at each call.
inline NodeKind kind_of(const torch::autograd::Node& node) {
  struct Known {
    std::string type;
    NodeKind kind;
  };
  // By address, since the hash of a std::type_index reads its whole name; and by name, since a plugin that is loaded
  // where another was may have a type where that one had its own.
  thread_local std::unordered_map<const std::type_info*, Known> known;
  const std::type_info& type = typeid(node);
  const auto found = known.find(&type);
  if (found != known.end() && found->second.type == type.name()) {
    return found->second.kind;
  }
  return (known[&type] = {type.name(), kind_by_name(node)}).kind;
}

/// Calls `visit(node, kind)` for every node behind `roots`, once, nearest first.
template <class Visit>
void for_each_node(const std::vector<torch::autograd::Node*>& roots, const Visit& visit) {
  std::vector<torch::autograd::Node*> open;
  std::unordered_set<const torch::autograd::Node*> seen;
  seen.reserve(64);
  const auto push = [&](torch::autograd::Node* node) {
    if (node != nullptr && seen.insert(node).second) {
      open.push_back(node);
    }
  };
  std::for_each(roots.begin(), roots.end(), push);
  for (std::size_t next = 0; next < open.size(); ++next) {
    torch::autograd::Node* const node = open[next];
    const NodeKind kind = kind_of(*node);
    visit(*node, kind);
    if (kind == NodeKind::copy_slices) {
      if (const auto& inner = static_cast<torch::autograd::CopySlices*>(node)->fn) {
        visit(*inner, kind_of(*inner));
      }
    }
    for (const torch::autograd::Edge& edge : node->next_edges()) {
      push(edge.function.get());
    }
  }
}

inline std::vector<torch::autograd::Node*> nodes_of(const std::vector<at::Tensor>& tensors) {
  std::vector<torch::autograd::Node*> result;
  for (const at::Tensor& tensor : tensors) {
    result.push_back(tensor.defined() ? tensor.grad_fn().get() : nullptr);
  }
  return result;
}

}  // namespace microreg::inline MICROREG_ABI::detail
