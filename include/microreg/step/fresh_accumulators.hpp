/// @file
/// Graphs apart from those that others keep.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/variable.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/libtorch.hpp>

#include <cstddef>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// While it lives, graphs of these leaves end in nodes of their own (AccumulateGrad), not in those of graphs that are
/// held somewhere, or of this step, which guards `.grad` by them.
///
/// Such a node belongs to the stream on which it was made, and the engine makes that stream wait for whatever ends in
/// it: on another one than what is being recorded as a CUDA graph, that ends the recording with an error.
class FreshAccumulators {
 public:
  explicit FreshAccumulators(std::vector<at::Tensor> leaves) : leaves_(std::move(leaves)) {
    before_.reserve(leaves_.size());  // nothing throws half-way
    for (const at::Tensor& leaf : leaves_) {
      before_.push_back(torch::autograd::impl::try_get_grad_accumulator(leaf));
      torch::autograd::impl::set_grad_accumulator(leaf, WeakNodePointer(NodePointer()));
    }
  }
  FreshAccumulators(const FreshAccumulators&) = delete;
  FreshAccumulators& operator=(const FreshAccumulators&) = delete;
  ~FreshAccumulators() {
    for (std::size_t i = 0; i < leaves_.size(); ++i) {
      torch::autograd::impl::set_grad_accumulator(leaves_[i], WeakNodePointer(before_[i]));
    }
  }

 private:
  std::vector<at::Tensor> leaves_;
  std::vector<NodePointer> before_;
};

}  // namespace microreg::inline MICROREG_ABI::detail
