/// @file
/// Keeps `.grad` from what the user's own functions do in a backward pass.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/libtorch.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>

#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

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
