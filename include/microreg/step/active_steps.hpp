/// @file
/// Which steps are being taken in this process: a difference moves the parameters meanwhile, which no other thread's
/// step may see, let alone move too.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/detail/thread_state.hpp>
#include <microreg/error.hpp>
#include <microreg/parameters.hpp>

#include <algorithm>
#include <mutex>
#include <string_view>
#include <thread>
#include <unordered_set>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// One step, while it lives. Steps of one thread, or of a worker of that, are nested, and know what they do.
class ActiveStep {
 public:
  enum class Moves {
    nothing,
    buffers,     ///< a difference of copies, which puts them back between its passes
    parameters,  ///< and displaces these
  };

  /// `side_by_side`: with workers. Throws ModelError if another thread is in a step on one of the same parameters and
  /// either of the two moves what they share, or if this step is nested in one side by side and moves parameters.
  ActiveStep(const Parameters& parameters, Moves moves, bool side_by_side)
      : parameters_(parameters), moves_(moves), side_by_side_(side_by_side) {
    const std::lock_guard lock(mutex());
    for (const ActiveStep* other : active()) {
      if (other->thread_ != thread_ && (moves_ != Moves::nothing || other->moves_ != Moves::nothing)) {
        require_apart(*other, "another thread is in a step on",
                      "take one step after the other, give each thread a model of its own, or use Exact in both");
      }
      if (other->thread_ == thread_ && other->side_by_side_ && moves_ == Moves::parameters) {
        require_apart(*other, "this step is nested in one whose micro-batches run side by side, on",
                      "set .workers = 0 in the outer step, or use Exact in both");
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

  void require_apart(const ActiveStep& other, std::string_view where, std::string_view remedy) const {
    std::unordered_set<const c10::StorageImpl*> theirs;
    for (const at::Tensor& tensor : other.parameters_.tensors) {
      theirs.insert(memory_of(tensor));
    }
    theirs.erase(nullptr);
    for (std::size_t i = 0; i < parameters_.tensors.size(); ++i) {
      if (theirs.contains(memory_of(parameters_.tensors[i]))) {
        throw ModelError(text({where, " parameter ", parameters_.names[i], " of shape ", parameters_.tensors[i].sizes(),
                               ", and a difference moves the parameters while it runs: ", remedy}));
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
  Moves moves_;
  bool side_by_side_;
  std::thread::id thread_ = works_for();
};

}  // namespace microreg::inline MICROREG_ABI::detail
