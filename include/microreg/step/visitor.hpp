/// @file
/// What the loop over micro-batches hears of the passes over one of them, and who may call the model.
#pragma once

#include <ATen/core/Tensor.h>
#include <microreg/step/mini_batch.hpp>

#include <functional>
#include <mutex>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// What one micro-batch needs to call model, loss and penalties, and to set buffers: of several side by side, one at a
/// time has it.
class Calls {
 public:
  explicit Calls(std::mutex& of_all) : lock_(of_all) {}

  /// Lets others call.
  void leave() {
    if (lock_.owns_lock()) {
      lock_.unlock();
    }
  }

  /// While it lives, the micro-batch may call again, whether it has left or not.
  class Again {
   public:
    explicit Again(Calls& calls) : lock_(calls.lock_), left_(!lock_.owns_lock()) {
      if (left_) {
        lock_.lock();
      }
    }
    Again(const Again&) = delete;
    Again& operator=(const Again&) = delete;
    ~Again() {
      if (left_) {
        lock_.unlock();
      }
    }

   private:
    std::unique_lock<std::mutex>& lock_;
    bool left_;
  };

 private:
  std::unique_lock<std::mutex> lock_;
};

/// What is to be told of the first pass over a micro-batch, in this order.
struct Visitor {
  Calls& calls;                           ///< for further passes
  std::function<void()> begin;            ///< before the model is called
  std::function<void(Evaluation&)> keep;  ///< before the graph goes
  /// When model, loss and penalties have been called, with the probes of each penalty: other micro-batches may call
  /// them from then on, but where this one is to be `through_first`.
  std::function<void(const Evaluation&, const std::vector<std::vector<at::Tensor>>&, bool through_first)> go_on;
};

}  // namespace microreg::inline MICROREG_ABI::detail
