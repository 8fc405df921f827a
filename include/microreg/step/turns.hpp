/// @file
/// Several threads that work on the pieces of one list, with what has to happen in its order in its order.
#pragma once

#include <ATen/Parallel.h>
#include <microreg/detail/thread_state.hpp>
#include <microreg/detail/threads_inside.hpp>
#include <microreg/version.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <latch>
#include <limits>
#include <mutex>
#include <thread>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// Who may do what by now. Every piece goes through two stages, which are entered one at a time and in the order of the
/// pieces: the forward pass, and the sums. What lies between the two runs beside the stages of other pieces.
class Turns {
 public:
  enum class Stage { forward, sum };

  /// Thrown where it makes no sense to go on.
  struct Stopped {};

  /// Waits until all pieces before this one have passed the stage. Throws Stopped if one of them has failed.
  void await(Stage stage, std::int64_t piece) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return next(stage) >= piece || failed_ < piece; });
    if (failed_ < piece) {
      throw Stopped{};
    }
  }

  void pass(Stage stage, std::int64_t piece) {
    const std::lock_guard lock(mutex_);
    next(stage) = std::max(next(stage), piece + 1);
    changed_.notify_all();
  }

  /// No piece behind this one goes on. Those before it do: the error of a step is that of the first piece that has one.
  void stop(std::int64_t piece, std::exception_ptr error) {
    const std::lock_guard lock(mutex_);
    if (piece < failed_) {
      failed_ = piece;
      error_ = std::move(error);
    }
    changed_.notify_all();
  }

  /// No piece goes on, and `error` is that of the step: pieces before the one that found it may have failed for the
  /// same reason, in words that do not tell it. To be called where an exception is handled; throws Stopped.
  [[noreturn]] void stop_all() {
    stop(-1, std::current_exception());
    throw Stopped{};
  }

  void rethrow() const {
    if (error_ != nullptr) {
      std::rethrow_exception(error_);
    }
  }

 private:
  [[nodiscard]] std::int64_t& next(Stage stage) { return next_[static_cast<std::size_t>(stage)]; }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::array<std::int64_t, 2> next_{};
  std::int64_t failed_ = std::numeric_limits<std::int64_t>::max();
  std::exception_ptr error_;
};

/// Calls work(piece, turns) for pieces 0 .. count - 1: one after the other on this thread where `workers` is 0, or on
/// that many threads, this one among them, which take over this one's ThreadState and run LibTorch's operations on one
/// thread each. A stage that `work` does not pass is passed when it returns.
inline void in_turns(std::int64_t workers, std::int64_t count, const std::function<void(std::int64_t, Turns&)>& work) {
  Turns turns;
  const auto run = [&](std::int64_t piece) {
    work(piece, turns);
    turns.pass(Turns::Stage::forward, piece);
    turns.pass(Turns::Stage::sum, piece);
  };
  if (workers == 0 || count == 0) {
    for (std::int64_t piece = 0; piece < count; ++piece) {
      run(piece);
    }
    return;
  }

  std::atomic<std::int64_t> next = 0;
  const auto work_off = [&] {
    for (std::int64_t piece = next++; piece < count; piece = next++) {
      try {
        run(piece);
      } catch (const Turns::Stopped&) {
        return;
      } catch (...) {
        turns.stop(piece, std::current_exception());
        return;
      }
    }
  };
  ThreadState state;
  const std::int64_t others = std::min(workers, count) - 1;
  {
    const ThreadsInside one(1);
    std::latch ready(others), go(1);
    const auto begin = [&] {
      // LibTorch sets a thread's number when it first asks for it, to what all threads begin with: before, not later.
      at::internal::lazy_init_num_threads();
      (void)at::get_num_threads();
      at::set_num_threads(1);
      ready.count_down();
      go.wait();
      const ThreadState::Here here(state);
      work_off();
    };
    std::vector<std::jthread> threads;
    try {
      while (static_cast<std::int64_t>(threads.size()) < others) {
        threads.emplace_back(begin);
      }
    } catch (const std::exception&) {  // the system has no more threads to give: those that there are
      ready.count_down(others - static_cast<std::int64_t>(threads.size()));
    }
    ready.wait();
    one.let_others_begin_as_before();
    go.count_down();
    const ThreadState::Warnings warnings(state);
    work_off();
  }
  turns.rethrow();
}

}  // namespace microreg::inline MICROREG_ABI::detail
