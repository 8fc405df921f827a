/// @file
/// What a plugin with an autograd node of its own exports.
#pragma once

extern "C" {

/// A new torch::Tensor behind such a node, and its end.
void* make_tensor();
void delete_tensor(void* tensor);

/// Where the node's type is described, by which the library remembers it.
const void* type_of_node();
}
