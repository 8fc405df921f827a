/// @file
/// The second derivative of wide linear layers through the Gram matrices of few samples.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/generated/Functions.h>
#include <microreg/detail/libtorch.hpp>
#include <microreg/detail/plain_tensors.hpp>
#include <microreg/detail/version_of.hpp>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// G = A B, a gradient that is a matrix product, or its transpose. That of a linear layer's weight is: of the layer's
/// input and of the gradient of its output, over the n samples.
///
/// The seed of a squared norm is c G, and what a backward pass would make of it without knowing that is
///
///     d/dA = (c G) B^T,   d/dB = A^T (c G):   2 r n k multiplications each, for G of r x k.
///
/// The same, by the n x n Gram matrices of A and B:
///
///     d/dA = c A (B B^T),   d/dB = c (A^T A) B:   2 n^2 (r + k) each,
///
/// which is next to nothing where n is small beside r and k, and needs no seed as large as the weight.
struct GramFactors {
  at::Tensor left;   ///< A, [r, n]
  at::Tensor right;  ///< B, [n, k]

  /// What d/dA and d/dB start from, in this order: the operands that are differentiable ..
  [[nodiscard]] std::vector<at::Tensor> roots() const { return {left, right}; }
  /// .. and their seeds, for c = 1. To be called without gradient mode.
  [[nodiscard]] std::vector<at::Tensor> seeds() const {
    return {left.mm(right.mm(right.t())), left.t().mm(left).mm(right)};
  }
};

/// Whether nothing but LibTorch reads or changes what passes through this node.
inline bool is_without_hooks(torch::autograd::Node& node) {
  return node.tensor_pre_hooks().empty() && node.retains_grad_hooks().empty() && node.pre_hooks().empty() &&
         node.post_hooks().empty();
}

/// The factors of a gradient that was computed with a graph; none where it is no such product, where the way through
/// its Gram matrices is no shorter, or where the graph has kept one factor only (the layer's input is data).
inline std::optional<GramFactors> gram_factors(const at::Tensor& gradient) {
  // Below this size a product takes no longer than finding out.
  constexpr std::int64_t worthwhile = 1 << 14;
  if (gradient.dim() != 2 || gradient.numel() < worthwhile || is_half(gradient.scalar_type()) || !is_plain(gradient) ||
      version_of(gradient) != 0 || is_transformed()) {
    return std::nullopt;
  }
  torch::autograd::Node* node = gradient.grad_fn().get();
  while (node != nullptr && is_without_hooks(*node) && node->num_outputs() == 1 && node->name() == "TBackward0") {
    node = node->next_edge(0).function.get();
  }
  auto* const product = dynamic_cast<torch::autograd::generated::MmBackward0*>(node);
  if (product == nullptr || !is_without_hooks(*product) || !product->should_compute_output(0) ||
      !product->should_compute_output(1)) {
    return std::nullopt;
  }
  GramFactors factors{product->self_.unpack(), product->mat2_.unpack()};
  const at::Tensor &left = factors.left, &right = factors.right;
  const std::int64_t samples = right.size(0);
  const bool plain = left.scalar_type() == gradient.scalar_type() && right.scalar_type() == gradient.scalar_type() &&
                     is_plain(left) && is_plain(right);
  return plain && 2 * samples * (left.size(0) + right.size(1)) < gradient.numel() ? std::optional(std::move(factors))
                                                                                  : std::nullopt;
}

}  // namespace microreg::inline MICROREG_ABI::detail
