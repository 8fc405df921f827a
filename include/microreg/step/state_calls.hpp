/// @file
/// What a forward pass does with parameters and buffers, by the operations that it calls.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/function_schema.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/ivalue.h>
#include <ATen/record_function.h>
#include <microreg/step/call_watch.hpp>
#include <microreg/version.hpp>

#include <algorithm>
#include <cstddef>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// While it lives, finds out which of some tensors the operations of this thread write to, and which of them a graph
/// may keep: those that an operation reads one of whose arguments is to be differentiated. By memory, so that views
/// count, and what writes to `.data` and counts no version. Batch normalisation in training mode writes to its running
/// statistics, and its derivatives keep but do not read them.
class StateCalls final : public CallWatch<StateCalls> {
 public:
  struct Use {
    bool written = false;
    bool kept = false;
    bool statistics = false;  ///< a batch normalisation in training mode keeps it too
  };

  explicit StateCalls(const std::vector<at::Tensor>& tensors) : CallWatch(true) {
    for (const at::Tensor& tensor : tensors) {
      if (const void* memory = memory_of(tensor)) {
        uses_.try_emplace(memory);
      }
    }
  }

  /// Everything, of a tensor whose memory nobody knows.
  [[nodiscard]] Use of(const at::Tensor& tensor) const {
    const auto found = uses_.find(memory_of(tensor));
    return found == uses_.end() ? Use{.kept = true} : found->second;
  }

 private:
  friend class CallWatch<StateCalls>;

  static const void* memory_of(const at::Tensor& tensor) {
    return tensor.defined() && tensor.has_storage() ? tensor.storage().unsafeGetStorageImpl() : nullptr;
  }

  template <class Visit>
  static void for_each_tensor(const c10::IValue& value, const Visit& visit) {
    if (value.isTensor()) {
      visit(value.toTensor());
    } else if (value.isList()) {
      for (const c10::IValue& each : value.toListRef()) {
        for_each_tensor(each, visit);
      }
    }
  }

  void note(const at::RecordFunction& function) {
    const auto inputs = inputs_of(function);
    bool differentiated = false;
    bool ours = false;
    for (const c10::IValue& input : inputs) {
      for_each_tensor(input, [&](const at::Tensor& tensor) {
        differentiated = differentiated || (tensor.defined() && tensor.requires_grad());
        ours = ours || uses_.contains(memory_of(tensor));
      });
    }
    const auto operation = function.operator_name();
    if (!ours || !operation.has_value()) {
      return;
    }
    const auto handle = c10::Dispatcher::singleton().findSchema(*operation);
    differentiated = differentiated && at::GradMode::is_enabled();
    const bool norm = handle.has_value() && normalises(function.name());
    const bool training = norm && trains(function.name(), handle->schema(), inputs);
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      const c10::Argument* const argument =
          handle.has_value() && i < handle->schema().arguments().size() ? &handle->schema().arguments()[i] : nullptr;
      const bool of_norm = norm && argument != nullptr && argument->name().starts_with("running_");
      for_each_tensor(inputs[i], [&](const at::Tensor& tensor) {
        if (const auto found = uses_.find(memory_of(tensor)); found != uses_.end()) {
          Use& use = found->second;
          const bool statistics = of_norm && training;
          const bool backward = std::string_view(function.name()).ends_with("_backward");
          use.written = use.written || (of_norm ? statistics && !backward : writes(argument));
          use.kept = use.kept || (differentiated && !statistics);
          use.statistics = use.statistics || (differentiated && statistics);
        }
      });
    }
  }

  static bool normalises(std::string_view name) {
    return name.find("batch_norm") != std::string_view::npos || name.find("instance_norm") != std::string_view::npos;
  }

  /// By the argument that says so; without one all are for training but one.
  static bool trains(std::string_view name, const c10::FunctionSchema& schema,
                     c10::ArrayRef<const c10::IValue> inputs) {
    for (std::size_t i = 0; i < std::min(inputs.size(), schema.arguments().size()); ++i) {
      const std::string_view argument = schema.arguments()[i].name();
      if (inputs[i].isBool() &&
          (argument == "training" || argument == "train" || argument == "update" || argument == "use_input_stats")) {
        return inputs[i].toBool();
      }
    }
    return name.find("no_update") == std::string_view::npos;
  }

  static bool writes(const c10::Argument* argument) {
    return argument != nullptr && argument->alias_info() != nullptr && argument->alias_info()->isWrite();
  }

  std::unordered_map<const void*, Use> uses_;
};

}  // namespace microreg::inline MICROREG_ABI::detail
