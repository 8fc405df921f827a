/// @file
/// The ranks of a c10d::ProcessGroup, LibTorch's own engine: Gloo, NCCL, or whatever the group was made of.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/intrusive_ptr.h>
#include <microreg/detail/libtorch.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/distributed/communicator.hpp>
#include <microreg/distributed/report.hpp>
#include <microreg/distributed/shard.hpp>
#include <microreg/error.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI {

/// How a communicator finds out that a rank is gone.
struct ProcessGroupOptions {
  /// How long a rank waits for the others, in each collective. What one rank does alone between two steps counts.
  std::chrono::milliseconds timeout{20'000};
  /// How long it then waits for the others to say that they are there, to find out who is not.
  std::chrono::milliseconds roll_call{5'000};
  /// Where they say so, a store that all ranks share; that of the group if empty, which LibTorch 2.7 and older do not
  /// tell. One communicator for each store, or a c10d::PrefixStore.
  c10::intrusive_ptr<c10d::Store> store = {};
};

/// A process group as a Communicator. Of the group it uses allreduce and broadcast alone, with `timeout` as theirs.
///
/// Where a collective fails, or has not ended in time, each rank answers a roll call in the store, and RankError names
/// those that did not. A rank that is still waiting looks there twice a second, so all of them end together.
///
/// ```cpp
/// auto ranks = std::make_shared<microreg::ProcessGroupCommunicator>(join());
/// ```
class ProcessGroupCommunicator final : public Communicator {
 public:
  /// Throws OptionError for a group without a backend. Tensors that none of its backends takes are copied to the first
  /// one's device, and back.
  explicit ProcessGroupCommunicator(c10::intrusive_ptr<c10d::ProcessGroup> group, ProcessGroupOptions options = {})
      : group_(std::move(group)), options_(std::move(options)) {
    if (!options_.store) {
      options_.store = detail::store_of<c10d::Store>(*group_);
    }
    for (const c10::Device& device : group_->getDeviceTypes()) {
      devices_.push_back(device.type());
    }
    if (devices_.empty()) {
      throw OptionError("the process group has no backend; call setBackend() on it first");
    }
  }

  [[nodiscard]] std::int64_t rank() const override { return group_->getRank(); }
  [[nodiscard]] std::int64_t size() const override { return group_->getSize(); }

  void abandon(const std::string& why) noexcept override {
    if (failure_.has_value()) {
      return;
    }
    failure_.emplace(why, std::vector<std::int64_t>{rank()});
    call_roll(why);
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr const char* failed_key = "microreg/failed";
  static constexpr const char* why_key = "microreg/why";
  static std::string alive_key(std::int64_t rank) { return "microreg/alive/" + std::to_string(rank); }

  std::function<void()> begin_all_reduce(const at::Tensor& flat) override {
    const at::Tensor staged = on_device_of_group(flat);
    auto work = begin([&] {
      std::vector<at::Tensor> tensors{staged};
      c10d::AllreduceOptions options;
      options.timeout = options_.timeout;
      return group_->allreduce(tensors, options);
    });
    return [this, flat, staged, work = std::move(work)] {
      wait(*work);
      if (!staged.is_same(flat)) {
        flat.copy_(staged);
      }
    };
  }

  void do_broadcast(const at::Tensor& flat, std::int64_t root) override {
    const at::Tensor staged = on_device_of_group(flat);
    const auto work = begin([&] {
      std::vector<at::Tensor> tensors{staged};
      c10d::BroadcastOptions options;
      options.rootRank = root;
      options.timeout = options_.timeout;
      return group_->broadcast(tensors, options);
    });
    wait(*work);
    if (!staged.is_same(flat)) {
      flat.copy_(staged);
    }
  }

  [[nodiscard]] at::Tensor on_device_of_group(const at::Tensor& flat) const {
    const bool fits = std::find(devices_.begin(), devices_.end(), flat.device().type()) != devices_.end();
    return fits ? flat : flat.to(c10::Device(devices_.front()));
  }

  template <class Begin>
  c10::intrusive_ptr<c10d::Work> begin(const Begin& begin_work) {
    if (failure_.has_value()) {
      throw *failure_;
    }
    try {
      return begin_work();
    } catch (const std::exception& error) {
      fail(first_line(error));
    }
  }

  void wait(c10d::Work& work) {
    if (failure_.has_value()) {
      throw *failure_;
    }
    const Clock::time_point began = Clock::now();
    std::optional<Watch> watch;
    for (int polls = 0; !work.isCompleted(); ++polls) {
      const auto waited = Clock::now() - began;
      if (waited > options_.timeout) {
        fail(detail::text({"nothing came for ", std::chrono::duration<double>(options_.timeout).count(), " s"}));
      }
      if (!watch.has_value() && waited > std::chrono::seconds(1) && options_.store) {
        watch.emplace(options_.store);
      }
      if (watch.has_value() && watch->has_failed()) {
        fail("other ranks wait in vain too");
      }
      std::this_thread::sleep_for(std::chrono::microseconds(polls < 100 ? 20 : polls < 1000 ? 200 : 1000));
    }
    try {
      work.wait();
    } catch (const std::exception& error) {
      fail(first_line(error));
    }
  }

  static std::string first_line(const std::exception& error) {
    const std::string message = error.what();
    return message.substr(0, message.find('\n'));
  }

  /// Looks every half second whether a rank has found that another one is gone. On a thread of its own, which may be
  /// left behind: where the host of the store has stopped, asking it does not end.
  class Watch {
   public:
    explicit Watch(c10::intrusive_ptr<c10d::Store> store) {
      std::thread([state = state_, store = std::move(store)] {
        std::unique_lock lock(state->mutex);
        while (!state->stop && !state->failed) {
          lock.unlock();
          bool failed = false;
          try {
            failed = store->check({failed_key});
          } catch (const std::exception&) {
            failed = true;
          }
          lock.lock();
          state->failed = failed;
          state->changed.wait_for(lock, std::chrono::milliseconds(500), [&] { return state->stop; });
        }
      }).detach();
    }
    Watch(const Watch&) = delete;
    Watch& operator=(const Watch&) = delete;
    ~Watch() {
      const std::lock_guard lock(state_->mutex);
      state_->stop = true;
      state_->changed.notify_all();
    }

    [[nodiscard]] bool has_failed() const {
      const std::lock_guard lock(state_->mutex);
      return state_->failed;
    }

   private:
    struct State {
      std::mutex mutex;
      std::condition_variable changed;
      bool stop = false;
      bool failed = false;
    };
    std::shared_ptr<State> state_ = std::make_shared<State>();
  };

  /// What a roll call found.
  struct Roll {
    std::mutex mutex;
    std::condition_variable changed;
    bool ended = false;
    bool without_store = false;
    std::vector<std::int64_t> missing = {};
    std::string why = {};  // of a rank that has said so
  };

  /// Answers, and waits until at most one other rank has not. `why`: what this rank has to say, if it is the one.
  std::shared_ptr<Roll> call_roll(const std::string& why) const noexcept {
    auto roll = std::make_shared<Roll>();
    if (!options_.store) {
      roll->without_store = true;
      return roll;
    }
    try {
      const auto deadline = Clock::now() + options_.roll_call;
      std::thread([roll, deadline, why, store = options_.store, own = rank(), size = size()] {
        const auto bytes = [](const std::string& words) {
          return std::vector<std::uint8_t>(words.begin(), words.end());
        };
        const auto note = [&](const auto& write) {
          const std::lock_guard lock(roll->mutex);
          write();
          roll->changed.notify_all();
        };
        try {
          if (!why.empty()) {
            store->set(why_key, bytes("rank " + std::to_string(own) + ": " + why));
          }
          store->set(alive_key(own), bytes("1"));
          store->set(failed_key, bytes("1"));
          for (bool searching = why.empty(); searching;) {
            std::vector<std::int64_t> missing;
            for (std::int64_t r = 0; r < size; ++r) {
              if (r != own && !store->check({alive_key(r)})) {
                missing.push_back(r);
              }
            }
            std::string said;
            if (store->check({why_key})) {
              const auto words = store->get(why_key);
              said.assign(words.begin(), words.end());
            }
            searching = said.empty() && missing.size() > 1 && Clock::now() < deadline;
            note([&] {
              roll->missing = std::move(missing);
              roll->why = std::move(said);
            });
            if (searching) {
              std::this_thread::sleep_for(std::chrono::milliseconds(100));
            }
          }
          note([&] { roll->ended = true; });
        } catch (const std::exception&) {
          note([&] { roll->ended = roll->without_store = true; });
        }
      }).detach();
      std::unique_lock lock(roll->mutex);
      if (!roll->changed.wait_until(lock, deadline + std::chrono::seconds(1), [&] { return roll->ended; })) {
        roll->without_store = roll->missing.empty();
      }
    } catch (const std::exception&) {
    }
    return roll;
  }

  /// Throws RankError, now and from now on.
  [[noreturn]] void fail(const std::string& why) {
    const auto roll = call_roll("");
    const std::lock_guard lock(roll->mutex);
    if (!roll->why.empty()) {
      failure_.emplace(roll->why, std::vector<std::int64_t>{std::stoll(roll->why.substr(5))});
    } else if (roll->without_store && !options_.store) {
      failure_.emplace(detail::text({"another rank does not answer (", why, "; which one, a store would tell)"}),
                       std::vector<std::int64_t>{});
    } else if (roll->without_store) {
      const std::int64_t host = 0;
      failure_.emplace(detail::text({rank() == host ? std::string("the host of the store")
                                                    : "rank 0, or the launcher where that holds the store,",
                                     " does not answer (", why, ")"}),
                       rank() == host ? std::vector<std::int64_t>{} : std::vector<std::int64_t>{host});
    } else if (roll->missing.empty()) {
      failure_.emplace(detail::text({"a connection between ranks is lost, though all of them are there (", why, ")"}),
                       std::vector<std::int64_t>{});
    } else {
      std::string names;
      for (const std::int64_t r : roll->missing) {
        names += (names.empty() ? "" : ", ") + std::to_string(r);
      }
      const bool one = roll->missing.size() == 1;
      failure_.emplace(
          detail::text({one ? "rank " : "ranks ", names, one ? " does not answer (" : " do not answer (", why, ")"}),
          roll->missing);
    }
    throw *failure_;
  }

  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  ProcessGroupOptions options_;
  std::vector<c10::DeviceType> devices_;
  std::optional<RankError> failure_;
};

}  // namespace microreg::inline MICROREG_ABI
