/// @file
/// Leaves of a loss that nobody trains.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/UndefinedTensorImpl.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/variable.h>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/parameters.hpp>
#include <microreg/step/graph.hpp>
#include <microreg/step/mini_batch.hpp>

#include <algorithm>
#include <cstddef>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// The leaves of a loss's graph that require a gradient and would get none. Those that a pass makes for itself (a loss
/// that differentiates by its input) die with its graph; what somebody still holds then would have been trained.
class UntrainedLeaves {
 public:
  void note(const MiniBatch& batch, const Evaluation& evaluation, const Parameters& parameters) {
    std::unordered_set<const c10::TensorImpl*> known;
    const auto add = [&](const at::Tensor& tensor) { known.insert(tensor.unsafeGetTensorImpl()); };
    std::for_each(parameters.tensors.begin(), parameters.tensors.end(), add);
    std::for_each(evaluation.inputs.begin(), evaluation.inputs.end(), add);
    for (const at::Tensor& leaf : leaves_of(evaluation.loss)) {
      if (!known.contains(leaf.unsafeGetTensorImpl())) {
        found_.emplace_back(leaf.getIntrusivePtr());
      }
    }
    if (!found_.empty()) {
      batch.for_each_tensor([&](const at::Tensor& tensor, const std::string& /*path*/) {
        std::erase_if(found_,
                      [&](const auto& leaf) { return leaf._unsafe_get_target() == tensor.unsafeGetTensorImpl(); });
      });
    }
  }

  /// To be called when the graph is gone, or differentiated. Throws ModelError.
  void require_none() {
    for (const auto& weak : std::exchange(found_, {})) {
      const auto leaf = weak.lock();
      if (!leaf.defined()) {
        continue;
      }
      const at::Tensor tensor(leaf);
      const std::size_t ours = 2 + (torch::autograd::impl::try_get_grad_accumulator(tensor).get() != nullptr ? 1 : 0);
      if (tensor.use_count() > ours) {
        throw ModelError(
            text({"the loss is a function of a tensor of shape ", tensor.sizes(),
                  " that requires a gradient and is no parameter of the model (a parameter of the loss, an encoder in "
                  "front of the model, another network, a module that was not registered), so it would get no .grad; "
                  "pass it in the option also_train (to Penalised among the parameters), make one model of several "
                  "with modules(), detach() what comes from it, or set .other_leaves = OtherLeaves::ignored where that "
                  "is what you want"}));
      }
    }
  }

 private:
  std::vector<c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>> found_;
};

}  // namespace microreg::inline MICROREG_ABI::detail
