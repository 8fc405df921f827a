/// @file
/// Built into two plugins of one layout, whose nodes differ in what they are: SPACE says as much, LibTorch's namespace
/// or one of the user's, in as many characters each.
#include "node.hpp"

#include <torch/torch.h>
#include <microreg/detail/libtorch.hpp>

#include <typeinfo>

#define EXPORT __attribute__((visibility("default")))

namespace SPACE {

struct PluginNode : torch::autograd::Node {
  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override { return gradients; }
};

}  // namespace SPACE

extern "C" {

EXPORT void* make_tensor() {
  auto* const result = new torch::Tensor(torch::ones({2}));
  const auto node = microreg::detail::make_node<SPACE::PluginNode>();
  node->set_next_edges(torch::autograd::collect_next_edges(torch::ones({2}, torch::requires_grad())));
  torch::autograd::create_gradient_edge(*result, node);
  return result;
}

EXPORT void delete_tensor(void* tensor) { delete static_cast<torch::Tensor*>(tensor); }

EXPORT const void* type_of_node() { return &typeid(SPACE::PluginNode); }
}
