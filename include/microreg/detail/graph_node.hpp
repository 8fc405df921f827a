/// @file
/// Tensors whose gradient is a function of ours.
#pragma once

#include <c10/util/Exception.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/libtorch.hpp>

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// A node with one result, whose derivative is a function. torch::autograd::Function would do, at ten seconds of every
/// user's compiler.
class GraphNode final : public torch::autograd::Node {
 public:
  /// From the gradient of the result, defined, to those of the operands. Where gradient mode is on, it is
  /// differentiated itself.
  using Derivative = std::function<std::vector<at::Tensor>(const at::Tensor& upstream)>;

  GraphNode(const char* name, torch::autograd::edge_list operands, Derivative derivative)
      : Node(std::move(operands)), name_(name), derivative_(std::move(derivative)) {}

  torch::autograd::variable_list apply(torch::autograd::variable_list&& upstream) override {
    TORCH_CHECK(derivative_ != nullptr, torch::autograd::ERR_BACKWARD_TWICE);
    return upstream[0].defined() ? derivative_(upstream[0]) : std::vector<at::Tensor>(num_outputs());
  }
  void release_variables() override { derivative_ = nullptr; }
  [[nodiscard]] std::string name() const override { return name_; }

 private:
  const char* name_;
  Derivative derivative_;
};

/// Makes `result` a function, with this derivative, of what lies at `operands`, also where it is there itself. `name`
/// is that of the node, of static life.
inline void set_derivative(const at::Tensor& result, torch::autograd::edge_list operands, const char* name,
                           GraphNode::Derivative derivative) {
  NodePointer node = make_node<GraphNode>(name, std::move(operands), std::move(derivative));
  const std::uint32_t number = node->add_input_metadata(result);
  torch::autograd::impl::set_gradient_edge(result, {std::move(node), number});
}

/// Where in the graph `tensors` lie.
inline torch::autograd::edge_list edges_of(at::TensorList tensors) {
  torch::autograd::edge_list edges;
  edges.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    edges.push_back(torch::autograd::impl::gradient_edge(tensor));
  }
  return edges;
}

}  // namespace microreg::inline MICROREG_ABI::detail
