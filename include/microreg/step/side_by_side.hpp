/// @file
/// Whether a micro-batch may be differentiated while the model is called for the next one.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <microreg/detail/hash.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/detail/version_of.hpp>
#include <microreg/error.hpp>
#include <microreg/parameters.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/own_code.hpp>
#include <microreg/step/state_calls.hpp>
#include <microreg/version.hpp>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// Watches the forward passes of a step whose micro-batches run beside one another. They themselves run one by one, in
/// order, so that running statistics move and random numbers are drawn as they would anyway, and nobody's forward pass,
/// loss or probe is called by two threads at once. What remains are derivatives that would meet them:
///
/// - They read tensors that the next forward pass writes to, as the power iteration of a spectral norm does. The
///   operations of each forward pass show which parameters and buffers it writes to and its graph keeps. Two things
///   more are looked at, since not all is an operation of this thread: versions and bytes, for writes, and how many
///   hold a tensor, for graphs.
/// - They run code of the user's own, a function or a hook, or a graph that came with the input and is shared.
///
/// Such micro-batches keep their turn until they are done, so that nothing runs beside them.
class SideBySide {
 public:
  /// `again`: each micro-batch calls the model more than once, which parameters that it writes to do not repeat.
  SideBySide(const MiniBatch& batch, const Parameters& parameters, std::vector<at::Tensor> state, bool again)
      : parameters_(parameters) {
    for (at::Tensor& tensor : state) {
      if (tensor.defined()) {
        items_.push_back({.tensor = std::move(tensor), .stays = again});
      }
    }
    for (const at::Tensor& buffer : batch.buffers()) {
      if (buffer.defined()) {
        items_.push_back({.tensor = buffer, .buffer = true});
      }
    }
    for (const Item& item : items_) {
      tensors_.push_back(item.tensor);
    }
  }

  /// To be called before a forward pass, within its turn. The watch is to live until that has been looked at.
  void begin(std::optional<StateCalls>& calls) {
    for (Item& item : items_) {
      item.version = version_of(item.tensor);
      item.hash = hash_of(item);
      item.holders = holders(item.tensor);
    }
    calls.emplace(tensors_);
  }

  /// To be called when model, loss and probes have been called: whether other micro-batches may go on now. Throws
  /// ModelError where this pass has written to what others may have been reading.
  [[nodiscard]] bool may_go_on(const StateCalls& calls, const Evaluation& evaluation,
                               const std::vector<std::vector<at::Tensor>>& probes, bool through_first) {
    std::vector<at::Tensor> roots{evaluation.loss};
    for (const std::vector<at::Tensor>& each : probes) {
      roots.insert(roots.end(), each.begin(), each.end());
    }
    const OwnCode code = own_code(roots, parameters_);
    bool apart = !through_first && !evaluation.shares_graph && !code.any() && at::isRecordFunctionEnabled();
    for (Item& item : items_) {
      const StateCalls::Use use = calls.of(item.tensor);
      const bool kept = use.kept || code.scripted || (!use.statistics && holders(item.tensor) > item.holders);
      const bool written = use.written || version_of(item.tensor) != item.version || hash_of(item) != item.hash;
      if (written && item.kept) {
        throw ModelError(text({"the forward pass wrote to a parameter or buffer of shape ", item.tensor.sizes(),
                               " in this micro-batch and not in those before, while others may have been reading it; "
                               "set .workers = 0"}));
      }
      item.written = item.written || written;
      item.keeps = kept || item.stays;
      apart = apart && !(item.written && kept) && !(written && item.stays);
    }
    for (Item& item : items_) {
      item.kept = item.kept || (apart && item.keeps);
    }
    return apart;
  }

 private:
  struct Item {
    at::Tensor tensor;
    bool stays = false;  ///< must not be written to
    bool buffer = false;
    std::uint64_t version = 0;
    std::uint64_t hash = 0;
    std::size_t holders = 0;
    bool written = false;  ///< by some forward pass
    bool keeps = false;    ///< the last one's graph does
    bool kept = false;     ///< by the graph of a micro-batch that others run beside
  };

  static std::size_t holders(const at::Tensor& tensor) {
    return tensor.use_count() + (tensor.has_storage() ? tensor.storage().use_count() : 0);
  }

  /// Of a buffer's bytes: a module may write to them without an operation. Large ones are left to those.
  static std::uint64_t hash_of(const Item& item) {
    constexpr std::size_t large = std::size_t{1} << 16;  // bytes
    const at::Tensor& tensor = item.tensor;
    if (!item.buffer || !tensor.is_cpu() || tensor.layout() != at::kStrided || !tensor.is_non_overlapping_and_dense() ||
        tensor.nbytes() > large) {
      return 0;
    }
    Hash hash;
    hash.add(tensor.const_data_ptr(), tensor.nbytes());
    return hash.value();
  }

  const Parameters& parameters_;
  std::vector<Item> items_;
  std::vector<at::Tensor> tensors_;  // of those
};

}  // namespace microreg::inline MICROREG_ABI::detail
