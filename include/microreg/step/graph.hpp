/// @file
/// What can be told from an autograd graph before and while it is differentiated: operations whose second derivative is
/// wrong, functions whose backward pass leaves the graph, and leaves that nobody named.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/variable.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/graph_walk.hpp>
#include <microreg/detail/libtorch.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
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

/// Watches a backward pass that makes a graph: throws ModelError before it where the graph has an operation whose
/// derivative cannot be differentiated rightly, and after it where a function of the user's own has left the graph.
class SecondDerivatives {
 public:
  SecondDerivatives(const std::vector<at::Tensor>& roots, std::string_view what) : what_(what) {
    for_each_node(nodes_of(roots), [&](torch::autograd::Node& node, NodeKind kind) {
      if (kind == NodeKind::weight_norm) {
        throw ModelError(text({what_,
                               " is a function of torch._weight_norm, of whose derivative LibTorch holds the "
                               "norms constant, so that the penalty's gradient would be wrong: run the forward "
                               "pass inside a microreg::FusedScope, on float32 or float64 (Regularizer does, "
                               "with .fused = true, and Penalised with a closure), or write g * v / v.norm()"}));
      }
      if (kind == NodeKind::norm_backward) {
        throw ModelError(text({what_,
                               " is a function of a gradient through batch or layer normalisation (a loss that "
                               "differentiates itself), whose further derivatives LibTorch computes wrongly: "
                               "run forward pass and loss inside a microreg::FusedScope (Regularizer does, "
                               "with .fused = true, and Penalised with a closure)"}));
      }
      if (kind == NodeKind::function) {
        hooks_.emplace_back(node.getptr(), node.add_post_hook(std::make_unique<Hook>(node.name(), found_)));
      }
    });
  }
  SecondDerivatives(const SecondDerivatives&) = delete;
  SecondDerivatives& operator=(const SecondDerivatives&) = delete;
  ~SecondDerivatives() {
    for (const auto& [node, key] : hooks_) {
      node->del_post_hook(key);
    }
  }

  void require_graphs() const {
    const std::lock_guard lock(found_->mutex);
    if (!found_->name.empty()) {
      throw ModelError(
          text({"the backward pass of ", found_->name, " leaves the graph, so ", what_,
                " has no second derivative there and the penalty would lose a part of its gradient; compute it in "
                "backward() by differentiable operations on what get_saved_variables() returns, without NoGradGuard "
                "or detach(), or use ForwardDifference"}));
    }
  }

 private:
  struct Found {
    std::mutex mutex;
    std::string name;
  };

  class Hook final : public torch::autograd::FunctionPostHook {
   public:
    Hook(std::string name, std::shared_ptr<Found> found) : name_(std::move(name)), found_(std::move(found)) {}

    torch::autograd::variable_list operator()(const torch::autograd::variable_list& outputs,
                                              const torch::autograd::variable_list& upstream) override {
      if (at::GradMode::is_enabled() && std::any_of(outputs.begin(), outputs.end(), [&](const at::Tensor& output) {
            return leaves_graph(output, upstream);
          })) {
        const std::lock_guard lock(found_->mutex);
        found_->name = name_;
      }
      return outputs;
    }

   private:
    /// A gradient is linear in what comes in, so it has a graph where that has one, unless it is zero. Where nothing
    /// that comes in has a graph, only a multiple of it, or of one, is known to be a constant.
    static bool leaves_graph(const at::Tensor& output, const torch::autograd::variable_list& upstream) {
      if (!output.defined() || output.requires_grad() || output.layout() != at::kStrided) {
        return false;
      }
      const at::NoGradGuard no_grad;
      const auto same = [&](const at::Tensor& each) { return each.is_same(output); };
      if (std::any_of(upstream.begin(), upstream.end(), same) || output.count_nonzero().item<std::int64_t>() == 0) {
        return false;
      }
      const bool graph = std::any_of(upstream.begin(), upstream.end(),
                                     [](const at::Tensor& each) { return each.defined() && each.requires_grad(); });
      if (graph || output.numel() == 1) {
        return true;
      }
      const auto multiple = [&](const at::Tensor& each) {
        if (!each.defined() || each.sizes() != output.sizes()) {
          return false;
        }
        const at::Tensor factor = (output * each).sum() / each.square().sum();
        return at::allclose(output, each * factor, 1e-6, 0);
      };
      return !(output.max() == output.min()).item<bool>() && std::none_of(upstream.begin(), upstream.end(), multiple);
    }

    std::string name_;
    std::shared_ptr<Found> found_;
  };

  std::string what_;
  std::shared_ptr<Found> found_ = std::make_shared<Found>();
  std::vector<std::pair<NodePointer, std::uintptr_t>> hooks_;
};

/// While it lives, nothing writes to `.grad` of these leaves but what is ours: a function that runs a backward pass of
/// its own (recomputation) would add to it behind the step's back. Throws from inside that pass, before it writes.
class GuardedGradients {
 public:
  GuardedGradients(const std::vector<at::Tensor>& leaves, const std::vector<std::string>& names) {
    const std::lock_guard lock(mutex());
    for (std::size_t i = 0; i < leaves.size(); ++i) {
      if (!leaves[i].is_leaf()) {
        continue;
      }
      auto node = torch::autograd::impl::grad_accumulator(leaves[i]);
      node->add_pre_hook(std::make_unique<Hook>(names[i]));
      auto* const hook = node->pre_hooks().back().get();
      hooks_.emplace_back(std::move(node), hook);
    }
  }
  GuardedGradients(const GuardedGradients&) = delete;
  GuardedGradients& operator=(const GuardedGradients&) = delete;
  ~GuardedGradients() {
    const std::lock_guard lock(mutex());
    for (const auto& [node, hook] : hooks_) {
      auto& all = node->pre_hooks();
      all.erase(
          std::find_if(all.begin(), all.end(), [wanted = hook](const auto& each) { return each.get() == wanted; }));
    }
  }

 private:
  class Hook final : public torch::autograd::FunctionPreHook {
   public:
    explicit Hook(std::string name) : name_(std::move(name)) {}
    torch::autograd::variable_list operator()(const torch::autograd::variable_list& /*gradients*/) override {
      throw ModelError(text(
          {"a function in the graph runs a backward pass of its own, which would write to .grad of parameter ", name_,
           " (as checkpointing does): give it torch::autograd::grad() by its inputs, and hand the "
           "parameters to it as inputs, or take it out"}));
    }

   private:
    std::string name_;
  };

  /// Two threads may evaluate one model.
  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }

  std::vector<std::pair<NodePointer, torch::autograd::FunctionPreHook*>> hooks_;
};

}  // namespace microreg::inline MICROREG_ABI::detail
