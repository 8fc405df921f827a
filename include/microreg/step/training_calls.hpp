/// @file
/// Finds the layers of a forward pass that behave differently in training: batch normalisation and dropout.
#pragma once

#include <ATen/record_function.h>

#include <cstdint>
#include <memory>
#include <string_view>
#include <utility>

namespace microreg::detail {

/// While it lives, counts them on this thread.
class TrainingCalls {
 public:
  TrainingCalls() : before_(current()) {
    current() = this;
    handle_ = at::addThreadLocalCallback(
        at::RecordFunctionCallback(&note).needsInputs(true).scopes({at::RecordScope::FUNCTION}));
  }
  TrainingCalls(const TrainingCalls&) = delete;
  TrainingCalls& operator=(const TrainingCalls&) = delete;
  ~TrainingCalls() {
    at::removeCallback(handle_);
    current() = before_;
  }

  /// Batch normalisations by the statistics of the batch.
  [[nodiscard]] std::int64_t batch_norms() const noexcept { return batch_norms_; }
  /// Dropouts of any kind that drop something.
  [[nodiscard]] std::int64_t dropouts() const noexcept { return dropouts_; }

 private:
  static TrainingCalls*& current() {
    thread_local TrainingCalls* one = nullptr;
    return one;
  }

  static std::unique_ptr<at::ObserverContext> note(const at::RecordFunction& function) {
    TrainingCalls* const self = current();
    const std::string_view name = function.name();
    if (self == nullptr || !name.starts_with("aten::")) {
      return nullptr;
    }
    const auto inputs = function.inputs();
    const auto is_true = [&](std::size_t position) {
      return inputs.size() > position && inputs[position].isBool() && inputs[position].toBool();
    };
    if (name == "aten::instance_norm") {
      self->instance_norm_ = true;  // a batch normalisation inside, over one sample's own statistics
    } else if (name == "aten::batch_norm" && !std::exchange(self->instance_norm_, false)) {
      // (input, weight, bias, running_mean, running_var, training, ..)
      self->batch_norms_ += is_true(5) ? 1 : 0;
    } else if (name.ends_with("dropout") || name.ends_with("dropout_")) {  // (input, p, train)
      const bool drops = inputs.size() > 1 && inputs[1].isDouble() && inputs[1].toDouble() > 0;
      self->dropouts_ += drops && is_true(2) && name != "aten::native_dropout" ? 1 : 0;
    }
    return nullptr;
  }

  std::int64_t batch_norms_ = 0;
  std::int64_t dropouts_ = 0;
  bool instance_norm_ = false;
  at::CallbackHandle handle_ = 0;
  TrainingCalls* before_;
};

}  // namespace microreg::detail
