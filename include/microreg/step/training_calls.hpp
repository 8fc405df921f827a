/// @file
/// Finds the layers of a forward pass that behave differently in training: batch normalisation and dropout.
#pragma once

#include <ATen/record_function.h>
#include <microreg/step/call_watch.hpp>

#include <cstdint>
#include <string_view>
#include <utility>

namespace microreg::inline MICROREG_ABI::detail {

/// While it lives, counts them on this thread.
class TrainingCalls final : public CallWatch<TrainingCalls> {
 public:
  TrainingCalls() : CallWatch(true) {}

  /// Batch normalisations by the statistics of the batch.
  [[nodiscard]] std::int64_t batch_norms() const noexcept { return batch_norms_; }
  /// Dropouts of any kind that drop something.
  [[nodiscard]] std::int64_t dropouts() const noexcept { return dropouts_; }

 private:
  friend class CallWatch<TrainingCalls>;

  void note(const at::RecordFunction& function) {
    const std::string_view name = function.name();
    if (!name.starts_with("aten::")) {
      return;
    }
    const auto inputs = inputs_of(function);
    const auto is_true = [&](std::size_t position) {
      return inputs.size() > position && inputs[position].isBool() && inputs[position].toBool();
    };
    if (name == "aten::instance_norm") {
      instance_norm_ = true;  // a batch normalisation inside, over one sample's own statistics
    } else if (name == "aten::batch_norm" && !std::exchange(instance_norm_, false)) {
      // (input, weight, bias, running_mean, running_var, training, ..)
      batch_norms_ += is_true(5) ? 1 : 0;
    } else if (name.ends_with("dropout") || name.ends_with("dropout_")) {  // (input, p, train)
      const bool drops = inputs.size() > 1 && inputs[1].isDouble() && inputs[1].toDouble() > 0;
      dropouts_ += drops && is_true(2) && name != "aten::native_dropout" ? 1 : 0;
    }
  }

  std::int64_t batch_norms_ = 0;
  std::int64_t dropouts_ = 0;
  bool instance_norm_ = false;
};

}  // namespace microreg::inline MICROREG_ABI::detail
