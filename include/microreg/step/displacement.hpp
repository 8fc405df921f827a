/// @file
/// Moving parameters for a while, with the promise that they come back bitwise.
#pragma once

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <microreg/detail/libtorch.hpp>

#include <cstddef>
#include <unordered_set>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// Whether `tensor` is all that there is in its storage.
inline bool fills_storage(const at::Tensor& tensor) {
  return tensor.layout() == at::kStrided && tensor.has_storage() && tensor.is_non_overlapping_and_dense() &&
         tensor.storage_offset() == 0 && tensor.storage().nbytes() == tensor.nbytes();
}

/// Tensors that a Displacement can move, with room for the values that they take meanwhile.
///
/// A tensor that fills its storage trades the storage's memory for that room, so that nothing is copied; whatever else
/// looks at the storage (a view, a detached alias) moves along. A tensor that shares its storage with others is
/// overwritten, and restored from a copy. Subtracting a displacement again would leave rounding behind.
class Displaceable {
 public:
  explicit Displaceable(const std::vector<at::Tensor>& tensors) {
    const at::NoGradGuard no_grad;
    const auto storage_of = [](const at::Tensor& tensor) {
      return tensor.has_storage() ? tensor.storage().unsafeGetStorageImpl() : nullptr;
    };
    std::unordered_multiset<const c10::StorageImpl*> storages;
    for (const at::Tensor& tensor : tensors) {
      storages.insert(storage_of(tensor));
    }
    for (const at::Tensor& tensor : tensors) {
      const bool trades = fills_storage(tensor) && storages.count(storage_of(tensor)) == 1;
      items_.push_back({tensor, at::empty_like(tensor), trades});
    }
  }

 private:
  friend class Displacement;

  struct Item {
    at::Tensor tensor;
    at::Tensor other;  // the displaced values before they move in, the original ones from then on
    bool trades;
    bool displaced = false;

    void trade() { swap_memory(tensor.storage(), other.storage()); }
  };

  std::vector<Item> items_;
};

/// While it lives, the tensors are moved by distance * directions[i]; an undefined direction leaves a tensor alone.
class Displacement {
 public:
  /// `distance` is a scalar on any device.
  Displacement(Displaceable& displaceable, const std::vector<at::Tensor>& directions, const at::Tensor& distance)
      : Displacement(displaceable) {  // from here on the destructor runs even if the rest throws
    const at::NoGradGuard no_grad;
    for (std::size_t i = 0; i < items_.size(); ++i) {
      if (!directions[i].defined()) {
        continue;
      }
      Displaceable::Item& item = items_[i];
      const at::Tensor factor = distance.to(item.tensor.device(), item.tensor.scalar_type());
      if (item.trades) {
        at::addcmul_out(item.other, item.tensor, directions[i], factor);
        item.trade();
        item.displaced = true;
      } else {
        item.other.copy_(item.tensor);
        item.displaced = true;
        item.tensor.addcmul_(directions[i], factor);
      }
    }
    at::autocast::clear_cache();  // which holds parameters in half precision, as they were
  }
  Displacement(const Displacement&) = delete;
  Displacement& operator=(const Displacement&) = delete;
  ~Displacement() {
    const at::NoGradGuard no_grad;
    for (auto item = items_.rbegin(); item != items_.rend(); ++item) {
      if (std::exchange(item->displaced, false)) {
        item->trades ? item->trade() : void(item->tensor.copy_(item->other));
      }
    }
    at::autocast::clear_cache();
  }

 private:
  explicit Displacement(Displaceable& displaceable) : items_(displaceable.items_) {}

  std::vector<Displaceable::Item>& items_;
};

}  // namespace microreg::inline MICROREG_ABI::detail
