/// @file
/// What an autograd graph tells: its leaves, and where in a model an operation stands.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/graph_walk.hpp>
#include <microreg/detail/text.hpp>

#include <cctype>
#include <string>
#include <string_view>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// The leaves behind `root` that require a gradient.
inline std::vector<at::Tensor> leaves_of(const at::Tensor& root) {
  std::vector<at::Tensor> result;
  for_each_node(nodes_of({root}), [&](torch::autograd::Node& node, NodeKind kind) {
    if (kind == NodeKind::leaf) {
      result.push_back(static_cast<torch::autograd::AccumulateGrad&>(node).variable);
    }
  });
  return result;
}

/// Where in a model an operation stands, by the nearest parameter that it is a function of: "behind features.3.weight",
/// or nothing if that cannot be told. `sentence` names the operation somewhere, as LibTorch's errors do.
inline std::string place_of(std::string_view sentence, const at::Tensor& root,
                            const std::vector<at::Tensor>& parameters, const std::vector<std::string>& names) {
  const auto plain = [](std::string_view letters) {
    std::string result;
    for (const char c : letters) {
      if (std::isalnum(static_cast<unsigned char>(c)) != 0) {
        result += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
      }
    }
    return result;
  };
  const std::string message = plain(sentence);
  torch::autograd::Node* found = nullptr;
  std::size_t longest = 3;
  for_each_node(nodes_of({root}), [&](torch::autograd::Node& node, NodeKind /*kind*/) {
    std::string name = node.name();
    name = name.substr(0, name.find("Backward"));
    if (const auto scope = name.rfind("::"); scope != std::string::npos) {
      name = name.substr(scope + 2);
    }
    name = plain(name);
    if (name.size() > longest && message.find(name) != std::string::npos) {
      longest = name.size();
      found = &node;
    }
  });
  std::string place;
  if (found != nullptr) {
    for_each_node({found}, [&](torch::autograd::Node& node, NodeKind kind) {
      if (kind == NodeKind::leaf && place.empty()) {
        const at::Tensor& variable = static_cast<torch::autograd::AccumulateGrad&>(node).variable;
        for (std::size_t i = 0; i < parameters.size(); ++i) {
          place = parameters[i].is_same(variable) ? "behind parameter " + names[i] : place;
        }
      }
    });
  }
  return place;
}

}  // namespace microreg::inline MICROREG_ABI::detail
