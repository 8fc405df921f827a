/// @file
/// What a first pass decided without a scope seeing it: in another thread, in a scripted graph, in a function of the
/// user's own.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/tensor.h>
#include <torch/csrc/autograd/variable.h>
#include <microreg/detail/engine_thread.hpp>
#include <microreg/detail/graph_walk.hpp>
#include <microreg/gates/activations.hpp>
#include <microreg/gates/decisions.hpp>
#include <microreg/gates/draws.hpp>
#include <microreg/gates/kinked_operation.hpp>
#include <microreg/gates/kinked_operations.hpp>
#include <microreg/gates/schema.hpp>
#include <microreg/gates/tape.hpp>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

namespace gating {

/// What LibTorch calls an operation's node, without "Backward0": each letter after none is a capital.
inline std::string node_stem(std::string_view operation) {
  operation = operation.substr(0, operation.find('.'));
  if (operation.ends_with("_forward")) {
    operation.remove_suffix(std::string_view("_forward").size());
  }
  std::string result;
  bool in_word = false;
  for (const char c : operation) {
    const auto letter = static_cast<unsigned char>(c);
    if (c != '_') {
      result += static_cast<char>(in_word ? std::tolower(letter) : std::toupper(letter));
    }
    in_word = std::isalpha(letter) != 0;
  }
  return result;
}

/// The nodes of operations that always have a kink. Not those which have one with some arguments (a norm).
inline std::set<std::string> kinked_stems() {
  std::set<std::string> result;
  for (const std::span<const KinkedOperation> list : kinked_operations) {
    for (const KinkedOperation& kinked : list) {
      if (kinked.has_kink == nullptr) {
        result.insert(node_stem(kinked.name));
      }
    }
  }
  result.insert(node_stem(kinked_rrelu.name));
  const auto add_names = [&](const auto& lists) {
    for (const Operations& list : lists) {
      for (const std::string_view operation : list.names) {
        if (!operation.starts_with("div")) {  // which has a kink with a rounding mode alone
          result.insert(node_stem(operation));
        }
      }
    }
  };
  add_names(selections);
  add_names(drawn_results);
  add_names(steps);
  return result;
}

/// Whether `node` may hold what was decided where no scope sees it: which elements it takes, or a factor without a
/// graph.
inline bool may_hold_decisions(const torch::autograd::Node& node, std::string_view stem) {
  static const std::set<std::string_view> choices = {"Where",  "MaskedFill", "MaskedScatter", "MaskedSelect",
                                                     "Index",  "IndexPut",   "IndexSelect",   "IndexAdd",
                                                     "Gather", "Scatter",    "ScatterAdd",    "Take"};
  return choices.contains(stem) ||
         (stem == "Mul" && std::any_of(node.next_edges().begin(), node.next_edges().end(),
                                       [](const torch::autograd::Edge& edge) { return !edge.is_valid(); }));
}

/// Tells nodes that another thread made from those of this thread, and from those of a backward pass with a graph,
/// which on a GPU are another thread's too: one of LibTorch's own, for whatever thread has asked for the pass.
class OwnThreads {
 public:
  explicit OwnThreads(c10::Device device) : device_(device) {}

  [[nodiscard]] bool made(const torch::autograd::Node& node) {
    if (node.thread_id() == at::RecordFunction::currentThreadId() || node.num_inputs() == 0) {
      return true;
    }
    return node.thread_id() == engine_thread_of(device_) ||
           node.thread_id() == engine_thread_of(node.input_metadata(0).device());
  }

 private:
  std::uint64_t engine_thread_of(c10::Device device) {
    const auto [found, is_new] = engine_threads_.try_emplace({device.type(), device.index()});
    if (is_new) {
      found->second = engine_thread(device);
    }
    return found->second;
  }

  c10::Device device_;
  std::map<std::pair<c10::DeviceType, c10::DeviceIndex>, std::uint64_t> engine_threads_;
};

}  // namespace gating

/// The nodes in the graph of `loss` that have a kink and are not on one of the tapes, by name, each once. A scripted
/// graph is one: its backward decides by itself. So are functions of the user's own if `functions` says so, since
/// nobody knows what they decide.
inline std::vector<std::string> unseen_kinks(const at::Tensor& loss, const std::vector<const GateTape*>& tapes,
                                             bool functions = false) {
  using torch::autograd::Node;
  static const std::set<std::string> kinked = gating::kinked_stems();
  std::set<std::pair<const void*, std::uint64_t>> seen;
  for (const GateTape* tape : tapes) {
    for (const GateTape::Entry& entry : tape->entries()) {
      seen.emplace(entry.node, entry.sequence_number);
    }
  }
  gating::OwnThreads own_threads(loss.device());
  std::set<std::string> result;
  for_each_node(nodes_of({loss}), [&](Node& node, NodeKind kind) {
    if (kind == NodeKind::copy_slices || seen.contains({&node, node.sequence_nr()})) {
      return;  // of what was written to a view the operation inside is asked
    }
    const bool complex =
        node.num_outputs() > 0 && node.next_edge(0).is_valid() &&
        c10::isComplexType(
            node.next_edge(0).function->input_metadata(node.next_edge(0).input_nr).dtype().toScalarType());
    if (complex) {
      return;  // decisions are made on real numbers
    }
    const std::string name = node.name();
    const bool opaque =
        name.find("DifferentiableGraph") != std::string::npos || (functions && kind == NodeKind::function);
    const std::string stem = name.substr(0, name.rfind("Backward"));
    if (opaque || kinked.contains(stem) || (gating::may_hold_decisions(node, stem) && !own_threads.made(node))) {
      result.insert(name);
    }
  });
  return {result.begin(), result.end()};
}

inline std::vector<std::string> unseen_kinks(const at::Tensor& loss, const GateTape& tape, bool functions = false) {
  return unseen_kinks(loss, std::vector<const GateTape*>{&tape}, functions);
}

}  // namespace microreg::inline MICROREG_ABI::detail
