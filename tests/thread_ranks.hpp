/// @file
/// Ranks as threads of one process: over a communicator of the tests' own, and, where its headers are there, over Gloo.
#pragma once

#include <torch/torch.h>
#include <microreg/distributed/communicator.hpp>
#include <microreg/error.hpp>

#if defined(MICROREG_WITH_GLOO)
#include <microreg/distributed/process_group.hpp>
#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#endif

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace thread_ranks {

using Communicators = std::vector<std::shared_ptr<microreg::Communicator>>;

/// Where the threads meet: each hands in its tensor, the last one does the work for all.
class Meeting {
 public:
  explicit Meeting(std::int64_t size) : tensors_(static_cast<std::size_t>(size)) {}

  void meet(std::int64_t rank, const torch::Tensor& tensor,
            const std::function<void(std::vector<torch::Tensor>&)>& work) {
    std::unique_lock lock(mutex_);
    require();
    const std::int64_t round = round_;
    tensors_[static_cast<std::size_t>(rank)] = tensor;
    if (++arrived_ == tensors_.size()) {
      arrived_ = 0;
      ++round_;
      work(tensors_);
      changed_.notify_all();
      return;
    }
    if (!changed_.wait_for(lock, std::chrono::seconds(60), [&] { return round_ != round || !failure_.empty(); })) {
      throw microreg::RankError("another rank does not answer", {});
    }
    if (round_ == round) {
      require();
    }
  }

  void fail(const std::string& why) {
    const std::lock_guard lock(mutex_);
    failure_ = why;
    changed_.notify_all();
  }

 private:
  void require() const {
    if (!failure_.empty()) {
      throw microreg::RankError(failure_, {});
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<torch::Tensor> tensors_;
  std::size_t arrived_ = 0;
  std::int64_t round_ = 0;
  std::string failure_;
};

class ThreadCommunicator final : public microreg::Communicator {
 public:
  ThreadCommunicator(std::shared_ptr<Meeting> meeting, std::int64_t rank, std::int64_t size)
      : meeting_(std::move(meeting)), rank_(rank), size_(size) {}

  [[nodiscard]] std::int64_t rank() const override { return rank_; }
  [[nodiscard]] std::int64_t size() const override { return size_; }
  void abandon(const std::string& why) noexcept override {
    meeting_->fail("rank " + std::to_string(rank_) + ": " + why);
  }

 private:
  std::function<void()> begin_all_reduce(const torch::Tensor& flat) override {
    meeting_->meet(rank_, flat, [](std::vector<torch::Tensor>& tensors) {
      torch::Tensor sum = tensors.front().clone();
      for (std::size_t r = 1; r < tensors.size(); ++r) {
        sum += tensors[r];
      }
      for (torch::Tensor& tensor : tensors) {
        tensor.copy_(sum);
      }
    });
    return [] {};
  }
  void do_broadcast(const torch::Tensor& flat, std::int64_t root) override {
    meeting_->meet(rank_, flat, [root](std::vector<torch::Tensor>& tensors) {
      for (torch::Tensor& tensor : tensors) {
        tensor.copy_(tensors[static_cast<std::size_t>(root)]);
      }
    });
  }

  std::shared_ptr<Meeting> meeting_;
  std::int64_t rank_;
  std::int64_t size_;
};

/// Calls `work(communicator)` on a thread for each rank; what each of them threw, or null.
inline std::vector<std::exception_ptr> run_on(
    std::int64_t size, const std::function<std::shared_ptr<microreg::Communicator>(std::int64_t)>& make,
    const std::function<void(std::shared_ptr<microreg::Communicator>)>& work) {
  std::vector<std::exception_ptr> errors(static_cast<std::size_t>(size));
  std::vector<std::thread> threads;
  for (std::int64_t r = 0; r < size; ++r) {
    threads.emplace_back([&, r] {
      try {
        work(make(r));
      } catch (...) {
        errors[static_cast<std::size_t>(r)] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  return errors;
}

inline std::vector<std::exception_ptr> try_ranks(
    std::int64_t size, const std::function<void(std::shared_ptr<microreg::Communicator>)>& work) {
  const auto meeting = std::make_shared<Meeting>(size);
  return run_on(size, [&](std::int64_t r) { return std::make_shared<ThreadCommunicator>(meeting, r, size); }, work);
}

#if defined(MICROREG_WITH_GLOO)
inline std::vector<std::exception_ptr> try_gloo_ranks(
    std::int64_t size, const std::function<void(std::shared_ptr<microreg::Communicator>)>& work,
    microreg::ProcessGroupOptions how = {}) {
  const auto store = c10::make_intrusive<c10d::HashStore>();
  return run_on(
      size,
      [&](std::int64_t r) {
        auto options = c10d::ProcessGroupGloo::Options::create(std::chrono::seconds(30));
        options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1"));
        options->threads = 1;
        const int rank = static_cast<int>(r), ranks = static_cast<int>(size);
        auto group = c10::make_intrusive<c10d::ProcessGroup>(store, rank, ranks);
        group->setBackend(c10::kCPU, c10d::ProcessGroup::BackendType::GLOO,
                          c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, ranks, options));
        microreg::ProcessGroupOptions with_store = how;
        if (microreg::detail::store_of<c10d::Store>(*group) == nullptr) {  // LibTorch before 2.8
          with_store.store = store;
        }
        return std::make_shared<microreg::ProcessGroupCommunicator>(group, with_store);
      },
      work);
}
#endif

/// The same; the first error is rethrown.
inline void run_ranks(std::int64_t size, const std::function<void(std::shared_ptr<microreg::Communicator>)>& work) {
  for (const std::exception_ptr& error : try_ranks(size, work)) {
    if (error) {
      std::rethrow_exception(error);
    }
  }
}

/// What was thrown on a rank, in words; "" for nothing.
inline std::string words_of(const std::exception_ptr& error) {
  if (!error) {
    return "";
  }
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& thrown) {
    return thrown.what();
  }
}

template <class Error>
bool is(const std::exception_ptr& error) {
  try {
    if (error) {
      std::rethrow_exception(error);
    }
  } catch (const Error&) {
    return true;
  } catch (...) {
  }
  return false;
}

}  // namespace thread_ranks
