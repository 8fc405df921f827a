/// @file
/// Finds recurrent networks that take the samples of a micro-batch for time steps.
#pragma once

#include <ATen/record_function.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/step/call_watch.hpp>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// While it lives and is `wanted`, notes how LSTM, GRU and RNN are called on this thread.
class RecurrentCalls final : public CallWatch<RecurrentCalls> {
 public:
  explicit RecurrentCalls(bool wanted) : CallWatch(wanted) {}

  /// Throws BatchError where a network read the micro-batch's `samples` along its dimension of time: only one of the
  /// first two dimensions has their number, and it is the other one that the network takes for the samples.
  void require_samples_in_batch(std::int64_t samples) const {
    for (const Call& call : calls_) {
      const std::int64_t batch = call.batch_first ? 0 : 1;
      if (call.sizes[static_cast<std::size_t>(1 - batch)] == samples &&
          call.sizes[static_cast<std::size_t>(batch)] != samples) {
        throw BatchError(text({call.name, " was called with an input of shape ", at::IntArrayRef(call.sizes),
                               ", whose dimension ", 1 - batch, " it reads as time, but there lie the ", samples,
                               " samples of the micro-batch, so the batch was cut along time; pass the sequences as "
                               "Along<1>(tensor), or make the network with .batch_first(",
                               call.batch_first ? "false" : "true", ")"}));
      }
    }
  }

 private:
  friend class CallWatch<RecurrentCalls>;

  struct Call {
    std::string name;
    std::vector<std::int64_t> sizes;
    bool batch_first;
  };

  void note(const at::RecordFunction& function) {
    const std::string_view name = function.name();
    if (name == "aten::lstm" || name == "aten::gru" || name == "aten::rnn_tanh" || name == "aten::rnn_relu") {
      const auto inputs = inputs_of(function);
      // (input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
      if (inputs.size() == 9 && inputs[0].isTensor() && inputs[8].isBool() && inputs[0].toTensor().dim() == 3) {
        calls_.push_back({std::string(name), inputs[0].toTensor().sizes().vec(), inputs[8].toBool()});
      }
    }
  }

  std::vector<Call> calls_;
};

}  // namespace microreg::inline MICROREG_ABI::detail
