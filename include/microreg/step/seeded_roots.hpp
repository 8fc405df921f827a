/// @file
/// Where backward passes start.
#pragma once

#include <ATen/ATen.h>
#include <ATen/SequenceNumber.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/graph_node.hpp>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// Nodes that this thread makes have at least this number from now on.
///
/// LibTorch's engine runs nodes of higher numbers first, so that a graph is left in the reverse order of its making. It
/// numbers them by thread: those that a device's thread makes in a pass with a graph may have lower ones than those of
/// the forward pass. The next pass then runs in another order from step to step, adds sums in it, frees memory late,
/// and finds nothing left of an operation in place on a view.
inline void number_nodes_from(std::uint64_t number) {
  while (at::sequence_number::peek() < number) {
    at::sequence_number::get_and_increment();
  }
}

/// Where a backward pass starts, and with what: one scalar, its value without meaning, whose gradient they are.
///
/// Handed to the engine themselves, seeds live until its pass ends; those that a node holds are let go with the node,
/// so that each gradient of a parameter is freed about when the next one of its size is made. And where a device's
/// thread runs the pass, it would begin at one of several roots before it knows of the others, and add sums in another
/// order each time.
class SeededRoots {
 public:
  /// `seeds_of` makes the seeds of `roots`, where it can in their memory. Where they lie in the graph is read before: a
  /// view that was written to gets another node, a slower one, and whether its memory is free depends on when a
  /// device's thread lets go of it.
  template <class SeedsOf>
  void add(const std::vector<at::Tensor>& roots, const SeedsOf& seeds_of) {
    torch::autograd::edge_list edges = edges_of(roots);
    std::vector<at::Tensor> seeds = seeds_of();
    std::move(edges.begin(), edges.end(), std::back_inserter(edges_));
    std::move(seeds.begin(), seeds.end(), std::back_inserter(seeds_));
    roots_.insert(roots_.end(), roots.begin(), roots.end());
  }

  [[nodiscard]] const std::vector<at::Tensor>& roots() const noexcept { return roots_; }

  /// The scalar; nothing is left here. The pass makes nodes, if any, behind those that there are.
  [[nodiscard]] at::Tensor taken() {
    const std::vector<at::Tensor> roots = std::exchange(roots_, {});
    at::Tensor result = at::zeros({}, roots.front().options().requires_grad(false));
    set_derivative(
        result, std::exchange(edges_, {}), "microreg::SeededRoots",
        [seeds = std::exchange(seeds_, {}), number = at::sequence_number::peek()](const at::Tensor& /*one*/) {
          number_nodes_from(number);
          return seeds;
        });
    return result;
  }

 private:
  std::vector<at::Tensor> roots_;
  torch::autograd::edge_list edges_;
  std::vector<at::Tensor> seeds_;
};

/// This thread's nodes come behind those of `tensors`, which another thread may have made.
inline void number_nodes_behind(const std::vector<at::Tensor>& tensors) {
  for (const at::Tensor& tensor : tensors) {
    if (tensor.defined() && tensor.grad_fn() != nullptr) {
      number_nodes_from(tensor.grad_fn()->sequence_nr() + 1);
    }
  }
}

}  // namespace microreg::inline MICROREG_ABI::detail
