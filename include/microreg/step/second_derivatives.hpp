/// @file
/// Backward passes that make a graph: what in it cannot be differentiated once more, or rightly.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/graph_walk.hpp>
#include <microreg/detail/libtorch.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

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

}  // namespace microreg::inline MICROREG_ABI::detail
