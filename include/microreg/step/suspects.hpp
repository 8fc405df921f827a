/// @file
/// What in a loss graph may make a difference disagree with double backward: a guess for an error message.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>
#include <microreg/detail/graph_walk.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/parameters.hpp>
#include <microreg/step/own_code.hpp>

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
  const OwnCode own = own_code({loss}, parameters);
  std::string old;
  for_each_node(nodes_of({loss}), [&](torch::autograd::Node& node, NodeKind kind) {
    if (kind != NodeKind::leaf && node.sequence_nr() < beginning) {
      old = node.name();
    }
  });
  if (!old.empty()) {
    return {text({"the graph has nodes that are older than the pass (", old,
                  "): weights that were made from parameters once, outside of forward(), do not move with them; make "
                  "them in each pass"}),
            !own.function.empty()};
  }
  if (!own.function.empty()) {
    return {text({"there is a function of one's own, ", own.function,
                  ", whose backward decides for itself, or is not the derivative of its forward"}),
            true};
  }
  if (!own.hook.empty()) {
    return {text({"there is a hook at ", own.hook,
                  ", which changes gradients, and which a difference applies to each of them: apply it to .grad after "
                  "the step"}),
            true};
  }
  return {};
}

}  // namespace microreg::inline MICROREG_ABI::detail
