/// @file
/// Whether a micro-batch may be differentiated while the model is called for the next one.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <microreg/detail/text.hpp>
#include <microreg/detail/version_of.hpp>
#include <microreg/error.hpp>
#include <microreg/parameters.hpp>
#include <microreg/step/call_watch.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/own_code.hpp>
#include <microreg/version.hpp>

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// While it lives, counts the calls of batch normalisation in training mode on this thread, by the running statistics:
/// it writes to them without counting a version, and its derivative keeps but does not read them.
class NormCalls final : public CallWatch<NormCalls> {
 public:
  explicit NormCalls(bool wanted) : CallWatch(wanted) {}

  [[nodiscard]] std::size_t with(const at::Tensor& statistics) const {
    const auto found = calls_.find(statistics.unsafeGetTensorImpl());
    return found == calls_.end() ? 0 : found->second;
  }

 private:
  friend class CallWatch<NormCalls>;

  void note(const at::RecordFunction& function) {
    if (std::string_view(function.name()) != "aten::batch_norm") {
      return;
    }
    const auto inputs = function.inputs();  // (input, weight, bias, running_mean, running_var, training, ..)
    if (inputs.size() > 5 && inputs[5].isBool() && inputs[5].toBool()) {
      for (const std::size_t i : {3U, 4U}) {
        if (inputs[i].isTensor() && inputs[i].toTensor().defined()) {
          ++calls_[inputs[i].toTensor().unsafeGetTensorImpl()];
        }
      }
    }
  }

  std::unordered_map<const c10::TensorImpl*, std::size_t> calls_;
};

/// Watches the forward passes of a step whose micro-batches run beside one another. They themselves run one by one, in
/// order, so that running statistics move and random numbers are drawn as they would anyway, and nobody's forward pass,
/// loss or probe is called by two threads at once. What remains are derivatives that would meet them:
///
/// - They read tensors that the next forward pass writes to, as the power iteration of a spectral norm does. The first
///   forward pass with all probes, which is alone, shows which parameters and buffers are written to and kept by the
///   graph.
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
        items_.push_back({std::move(tensor), again});
      }
    }
    for (const at::Tensor& buffer : batch.buffers()) {
      if (buffer.defined()) {
        items_.push_back({buffer, false});
      }
    }
  }

  /// To be called before a forward pass, within its turn.
  void begin(bool first) {
    for (Item& item : items_) {
      item.version = version_of(item.tensor);
      if (first) {
        item.holders = holders(item.tensor);
      }
    }
  }

  /// To be called when model, loss and probes have been called: whether other micro-batches may go on now. Throws
  /// ModelError where this pass has written to what others may have been reading.
  [[nodiscard]] bool may_go_on(bool first, const NormCalls& norms, const Evaluation& evaluation,
                               const std::vector<std::vector<at::Tensor>>& probes) {
    first ? judge(norms) : require_no_more();
    if (!apart_) {
      return false;
    }
    std::vector<at::Tensor> roots{evaluation.loss};
    for (const std::vector<at::Tensor>& each : probes) {
      roots.insert(roots.end(), each.begin(), each.end());
    }
    return !evaluation.shares_graph && !own_code(roots, parameters_).any();
  }

 private:
  struct Item {
    at::Tensor tensor;
    bool stays;  ///< must not be written to
    std::uint64_t version = 0;
    std::size_t holders = 0;
    bool written = false;
  };

  static std::size_t holders(const at::Tensor& tensor) {
    return tensor.use_count() + (tensor.has_storage() ? tensor.storage().use_count() : 0);
  }

  void judge(const NormCalls& calls) {
    for (Item& item : items_) {
      const std::size_t norms = calls.with(item.tensor);
      item.written = version_of(item.tensor) != item.version;
      const bool kept = holders(item.tensor) != item.holders + norms;
      apart_ = apart_ && !(item.written && item.stays) && !((item.written || norms > 0) && kept);
    }
  }

  void require_no_more() const {
    for (const Item& item : items_) {
      if (apart_ && !item.written && version_of(item.tensor) != item.version) {
        throw ModelError(text({"the forward pass wrote to a parameter or buffer of shape ", item.tensor.sizes(),
                               " in this micro-batch and not in the first, while others may have been reading it; set "
                               ".workers = 0"}));
      }
    }
  }

  const Parameters& parameters_;
  std::vector<Item> items_;
  bool apart_ = true;  ///< derivatives do not read what forward passes write to
};

}  // namespace microreg::inline MICROREG_ABI::detail
