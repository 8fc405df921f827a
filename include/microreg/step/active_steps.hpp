/// @file
/// Which steps are being taken in this process: a difference moves the parameters meanwhile, which no other thread's
/// step may see, let alone move too.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/parameters.hpp>

#include <algorithm>
#include <mutex>
#include <thread>
#include <unordered_set>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// One step, while it lives. Steps of one thread are nested, and know what they do.
class ActiveStep {
 public:
  /// Throws ModelError if another thread is in a step on one of the same parameters and either of the two moves them.
  ActiveStep(const Parameters& parameters, bool moves) : parameters_(parameters), moves_(moves) {
    const std::lock_guard lock(mutex());
    for (const ActiveStep* other : active()) {
      if (other->thread_ != thread_ && (moves_ || other->moves_)) {
        require_apart(*other);
      }
    }
    active().push_back(this);
  }
  ActiveStep(const ActiveStep&) = delete;
  ActiveStep& operator=(const ActiveStep&) = delete;
  ~ActiveStep() {
    const std::lock_guard lock(mutex());
    active().erase(std::find(active().begin(), active().end(), this));
  }

 private:
  static const c10::StorageImpl* memory_of(const at::Tensor& tensor) {
    return tensor.has_storage() ? tensor.storage().unsafeGetStorageImpl() : nullptr;
  }

  void require_apart(const ActiveStep& other) const {
    std::unordered_set<const c10::StorageImpl*> theirs;
    for (const at::Tensor& tensor : other.parameters_.tensors) {
      theirs.insert(memory_of(tensor));
    }
    theirs.erase(nullptr);
    for (std::size_t i = 0; i < parameters_.tensors.size(); ++i) {
      if (theirs.contains(memory_of(parameters_.tensors[i]))) {
        throw ModelError(text({"another thread is in a step on parameter ", parameters_.names[i], " of shape ",
                               parameters_.tensors[i].sizes(),
                               ", and a difference moves the parameters while it runs: take one step after the other, "
                               "give each thread a model of its own, or use Exact in both"}));
      }
    }
  }

  static std::mutex& mutex() {
    static std::mutex one;
    return one;
  }
  static std::vector<const ActiveStep*>& active() {
    static std::vector<const ActiveStep*> all;
    return all;
  }

  const Parameters& parameters_;
  bool moves_;
  std::thread::id thread_ = std::this_thread::get_id();
};

}  // namespace microreg::inline MICROREG_ABI::detail
