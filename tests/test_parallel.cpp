// Loops on LibTorch's threads, from a file that is compiled without OpenMP.
#include "catch.hpp"

#include <torch/torch.h>
#include <microreg/detail/parallel.hpp>
#include <microreg/detail/threads_inside.hpp>

#include <atomic>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

using microreg::detail::parallel_for;
using microreg::detail::ThreadsInside;

namespace {

/// The parts that a loop falls into, in order, and how many threads ran them.
struct Run {
  std::vector<std::pair<std::int64_t, std::int64_t>> parts;
  std::size_t threads = 0;
};

Run run(std::int64_t begin, std::int64_t end, std::int64_t grain) {
  std::mutex mutex;
  std::set<std::thread::id> threads;
  std::set<std::pair<std::int64_t, std::int64_t>> parts;
  parallel_for(begin, end, grain, [&](std::int64_t from, std::int64_t to) {
    const std::lock_guard lock(mutex);
    threads.insert(std::this_thread::get_id());
    parts.emplace(from, to);
  });
  return {{parts.begin(), parts.end()}, threads.size()};
}

}  // namespace

TEST_CASE("a parallel loop runs on as many threads as LibTorch has, each with its part", "[parallel]") {
  using Parts = std::vector<std::pair<std::int64_t, std::int64_t>>;
  const ThreadsInside two(2);
  const Run both = run(3, 104, 1);
  CHECK(both.threads == 2);
  CHECK(both.parts == Parts{{3, 53}, {53, 104}});
  CHECK(run(0, 100, 100).parts == Parts{{0, 100}});
  CHECK(run(0, 1, 1).parts == Parts{{0, 1}});
  CHECK(run(5, 5, 1).parts.empty());
  const ThreadsInside one(1);
  CHECK(run(3, 104, 1).parts == Parts{{3, 104}});
}

TEST_CASE("a parallel loop within another is serial", "[parallel]") {
  const ThreadsInside two(2);
  std::atomic<int> outer = 0;
  std::atomic<int> inner = 0;
  parallel_for(0, 2, 1, [&](std::int64_t /*begin*/, std::int64_t /*end*/) {
    ++outer;
    const auto thread = std::this_thread::get_id();
    parallel_for(0, 100, 1, [&](std::int64_t begin, std::int64_t end) {
      inner += begin == 0 && end == 100 && std::this_thread::get_id() == thread ? 1 : 1000;
    });
  });
  CHECK(outer == 2);
  CHECK(inner == 2);
}

TEST_CASE("an exception in a parallel loop arrives at the caller", "[parallel]") {
  const ThreadsInside two(2);
  CHECK_THROWS_AS(parallel_for(0, 100, 1,
                               [](std::int64_t begin, std::int64_t /*end*/) {
                                 if (begin > 0) {
                                   throw std::runtime_error("second part");
                                 }
                               }),
                  std::runtime_error);
}
