/// @file
/// How many threads LibTorch's operations run on, set for a while.
#pragma once

#include <ATen/Parallel.h>
#include <microreg/version.hpp>

#include <exception>
#include <thread>

namespace microreg::inline MICROREG_ABI::detail {

/// While it lives, LibTorch's operations run on so many threads each where this thread calls them.
class ThreadsInside {
 public:
  explicit ThreadsInside(int count) : before_(at::get_num_threads()) { at::set_num_threads(count); }
  ThreadsInside(const ThreadsInside&) = delete;
  ThreadsInside& operator=(const ThreadsInside&) = delete;
  ~ThreadsInside() { at::set_num_threads(before_); }

  /// at::set_num_threads() is also what threads that are still to come begin with: again what it was, which only
  /// another thread can say without changing this one's.
  void let_others_begin_as_before() const {
    try {
      std::jthread([before = before_] { at::set_num_threads(before); });
    } catch (const std::exception&) {  // the system has no more threads to give: at the end, then
    }
  }

 private:
  int before_;
};

}  // namespace microreg::inline MICROREG_ABI::detail
