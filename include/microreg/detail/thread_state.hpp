/// @file
/// What LibTorch and this library keep for each thread, taken over by another one.
#pragma once

#include <ATen/ThreadLocalState.h>
#include <ATen/autocast_mode.h>
#include <c10/core/DeviceType.h>
#include <c10/util/Exception.h>
#include <torch/csrc/jit/python/update_graph_executor_opt.h>
#include <microreg/version.hpp>

#include <mutex>
#include <thread>
#include <utility>

namespace microreg::inline MICROREG_ABI::detail {

/// The thread that this one works for: itself, unless it is a worker.
inline std::thread::id& works_for() {
  thread_local std::thread::id one = std::this_thread::get_id();
  return one;
}

/// The state of the thread that makes it: gradient mode, scopes, callbacks and the rest that LibTorch carries from one
/// thread to another, and what it does not: autocast's type, cache and nesting, the handler of warnings, and whether
/// scripted code is optimised.
class ThreadState {
 public:
  ThreadState() : nested_(at::autocast::increment_nesting() > 1), handler_(*c10::WarningUtils::get_warning_handler()) {
    at::autocast::decrement_nesting();
  }

  /// While it lives, warnings on this thread, whose state it is, do not reach the handler beside those of others.
  class Warnings {
   public:
    explicit Warnings(ThreadState& state) : warnings_(&state.handler_) {}

   private:
    c10::WarningUtils::WarningHandlerGuard warnings_;
  };

  /// While it lives, this thread is in that state.
  class Here {
   public:
    explicit Here(ThreadState& state) : state_(state), guard_(state.state_), warnings_(&state.handler_) {
      at::autocast::set_autocast_dtype(c10::kCPU, state.half_);
      at::autocast::set_autocast_cache_enabled(state.caches_);
      if (state.nested_) {  // otherwise the end of a scope inside would clear the cache, which threads share
        at::autocast::increment_nesting();
      }
      torch::jit::setGraphExecutorOptimize(state.optimizes_);
      works_for() = state.thread_;
    }
    Here(const Here&) = delete;
    Here& operator=(const Here&) = delete;
    ~Here() {
      works_for() = before_;
      torch::jit::setGraphExecutorOptimize(optimized_);
      if (state_.nested_) {
        at::autocast::decrement_nesting();
      }
    }

   private:
    ThreadState& state_;
    at::ThreadLocalStateGuard guard_;
    c10::WarningUtils::WarningHandlerGuard warnings_;
    bool optimized_ = torch::jit::getGraphExecutorOptimize();
    std::thread::id before_ = works_for();
  };

 private:
  /// Hands warnings on, one at a time: who made the handler knows of one thread.
  class OneByOne final : public c10::WarningHandler {
   public:
    explicit OneByOne(c10::WarningHandler& handler) : handler_(handler) {}
    void process(const c10::Warning& warning) override {
      const std::lock_guard lock(mutex_);
      handler_.process(warning);
    }

   private:
    c10::WarningHandler& handler_;
    std::recursive_mutex mutex_;  // a handler may cause a warning
  };

  at::ThreadLocalState state_;
  at::ScalarType half_ = at::autocast::get_autocast_dtype(c10::kCPU);
  bool caches_ = at::autocast::is_autocast_cache_enabled();
  bool nested_;
  OneByOne handler_;
  bool optimizes_ = torch::jit::getGraphExecutorOptimize();
  std::thread::id thread_ = works_for();
};

}  // namespace microreg::inline MICROREG_ABI::detail
