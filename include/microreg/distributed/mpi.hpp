/// @file
/// The ranks of an MPI communicator, for models on the CPU.
#pragma once

#include <ATen/ATen.h>
#include <microreg/detail/text.hpp>
#include <microreg/distributed/communicator.hpp>
#include <microreg/distributed/report.hpp>
#include <microreg/distributed/shard.hpp>
#include <microreg/error.hpp>

#include <mpi.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI {

/// How a communicator finds out that a rank is gone: as in ProcessGroupOptions.
struct MpiOptions {
  std::chrono::milliseconds timeout{20'000};   ///< how long a collective waits for the others
  std::chrono::milliseconds roll_call{5'000};  ///< how long it then waits for their answers, to name who is gone
};

/// An MPI communicator as a Communicator, of tensors on the CPU. It works on duplicates of its own, from one thread,
/// with MPI initialised by the program (MPI_THREAD_FUNNELED is enough).
///
/// A rank that is killed makes mpirun end the others. One that stops answering is named by the RankError of the others;
/// MPI_Finalize would wait for it for ever, so end the program by MPI_Abort then.
class MpiCommunicator final : public Communicator {
 public:
  /// A collective, since it duplicates `ranks`: to be called on all of them, after MPI_Init.
  explicit MpiCommunicator(MPI_Comm ranks = MPI_COMM_WORLD, MpiOptions options = {}) : options_(options) {
    for (MPI_Comm* own : {&collectives_, &messages_}) {
      MPI_Comm_dup(ranks, own);
      MPI_Comm_set_errhandler(*own, MPI_ERRORS_RETURN);
    }
    MPI_Comm_rank(ranks, &rank_);
    MPI_Comm_size(ranks, &size_);
  }

  [[nodiscard]] std::int64_t rank() const override { return rank_; }
  [[nodiscard]] std::int64_t size() const override { return size_; }

  void abandon(const std::string& why) noexcept override {
    if (!failure_.has_value()) {
      failure_.emplace(why, std::vector<std::int64_t>{rank_});
      answer(why);
    }
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr int tag = 1;

  /// A collective under way, with the memory that it reads and writes.
  struct Pending {
    std::vector<MPI_Request> requests;
    at::Tensor flat;
  };

  std::function<void()> begin_all_reduce(const at::Tensor& flat) override {
    const MPI_Datatype type = type_of(flat);
    return begin(flat, flat.numel(), flat.element_size(), [&](char* data, int count, MPI_Request* request) {
      return MPI_Iallreduce(MPI_IN_PLACE, data, count, type, MPI_SUM, collectives_, request);
    });
  }

  void do_broadcast(const at::Tensor& flat, std::int64_t root) override {
    begin(flat, static_cast<std::int64_t>(flat.nbytes()), 1, [&](char* data, int count, MPI_Request* request) {
      return MPI_Ibcast(data, count, MPI_BYTE, static_cast<int>(root), collectives_, request);
    })();
  }

  static MPI_Datatype type_of(const at::Tensor& flat) {
    switch (flat.scalar_type()) {
      case at::kFloat:
        return MPI_FLOAT;
      case at::kDouble:
        return MPI_DOUBLE;
      case at::kLong:
        return MPI_INT64_T;
      default:
        throw OptionError(detail::text({"MPI has no sum of ", flat.scalar_type(), "; use float32 or float64"}));
    }
  }

  /// `start(data, count, request)` in pieces whose counts MPI can name.
  template <class Start>
  std::function<void()> begin(const at::Tensor& flat, std::int64_t count, std::int64_t size, const Start& start) {
    if (failure_.has_value()) {
      throw *failure_;
    }
    if (!flat.is_cpu()) {
      throw OptionError(detail::text({"MPI takes tensors on the CPU, the model is on ", flat.device(),
                                      "; use a ProcessGroupCommunicator with NCCL"}));
    }
    constexpr std::int64_t piece = std::int64_t{1} << 28;
    auto pending = std::make_shared<Pending>();
    pending->flat = flat;
    for (std::int64_t first = 0; first < count; first += piece) {
      MPI_Request request = MPI_REQUEST_NULL;
      char* const data = static_cast<char*>(flat.mutable_data_ptr()) + first * size;
      check(start(data, static_cast<int>(std::min(piece, count - first)), &request));
      pending->requests.push_back(request);
    }
    pending_.push_back(pending);  // also where nobody waits for it any more
    return [this, pending] { wait(pending); };
  }

  void wait(const std::shared_ptr<Pending>& pending) {
    if (failure_.has_value()) {
      throw *failure_;
    }
    const Clock::time_point began = Clock::now();
    for (int polls = 0;; ++polls) {
      int done = 0;
      check(MPI_Testall(static_cast<int>(pending->requests.size()), pending->requests.data(), &done,
                        MPI_STATUSES_IGNORE));
      if (done != 0) {
        break;
      }
      const auto waited = Clock::now() - began;
      if (waited > options_.timeout) {
        fail(detail::text({"nothing came for ", std::chrono::duration<double>(options_.timeout).count(), " s"}));
      }
      int failed = 0;
      if (polls % 256 == 255) {
        MPI_Iprobe(MPI_ANY_SOURCE, tag, messages_, &failed, MPI_STATUS_IGNORE);
      }
      if (failed != 0) {
        fail("other ranks wait in vain too");
      }
      if (polls > 200) {
        std::this_thread::sleep_for(std::chrono::microseconds(polls < 2000 ? 20 : 500));
      }
    }
    std::erase(pending_, pending);
  }

  void check(int error) {
    if (error != MPI_SUCCESS) {
      char words[MPI_MAX_ERROR_STRING] = {};
      int length = 0;
      MPI_Error_string(error, words, &length);
      fail(std::string(words, static_cast<std::size_t>(length)));
    }
  }

  /// Tells all others that this rank is there, and why it has failed, if it has.
  void answer(const std::string& why) noexcept {
    static std::deque<std::string> kept;  // where they are, until the messages have gone, which nobody waits for
    kept.push_back(why + '\0');
    for (int r = 0; r < size_; ++r) {
      MPI_Request request = MPI_REQUEST_NULL;
      if (r != rank_ && MPI_Isend(kept.back().data(), static_cast<int>(kept.back().size()), MPI_CHAR, r, tag, messages_,
                                  &request) == MPI_SUCCESS) {
        MPI_Request_free(&request);
      }
    }
  }

  /// Throws RankError, now and from now on, that names who has not answered, or who has said why.
  [[noreturn]] void fail(const std::string& why) {
    answer("");
    std::vector<bool> there(static_cast<std::size_t>(size_));
    there[static_cast<std::size_t>(rank_)] = true;
    std::string said;
    int sayer = -1;
    const auto missing = [&] { return std::count(there.begin(), there.end(), false); };
    const auto deadline = Clock::now() + options_.roll_call;
    const auto at_least = Clock::now() + std::chrono::milliseconds(200);  // for what is on its way
    while (sayer < 0 && Clock::now() < deadline && (missing() > 1 || Clock::now() < at_least)) {
      int found = 0;
      MPI_Status status;
      MPI_Iprobe(MPI_ANY_SOURCE, tag, messages_, &found, &status);
      if (found == 0) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        continue;
      }
      int length = 0;
      MPI_Get_count(&status, MPI_CHAR, &length);
      std::string words(static_cast<std::size_t>(length), ' ');
      MPI_Recv(words.data(), length, MPI_CHAR, status.MPI_SOURCE, tag, messages_, MPI_STATUS_IGNORE);
      there[static_cast<std::size_t>(status.MPI_SOURCE)] = true;
      if (length > 1) {
        said = words.substr(0, words.size() - 1);
        sayer = status.MPI_SOURCE;
      }
    }
    if (sayer >= 0) {
      failure_.emplace(detail::text({"rank ", sayer, ": ", said}), std::vector<std::int64_t>{sayer});
    } else if (missing() == 0) {
      failure_.emplace(detail::text({"a connection between ranks is lost, though all of them are there (", why, ")"}),
                       std::vector<std::int64_t>{});
    } else {
      std::vector<std::int64_t> ranks;
      std::string names;
      for (int r = 0; r < size_; ++r) {
        if (!there[static_cast<std::size_t>(r)]) {
          ranks.push_back(r);
          names += (names.empty() ? "" : ", ") + std::to_string(r);
        }
      }
      failure_.emplace(detail::text({ranks.size() == 1 ? "rank " : "ranks ", names,
                                     ranks.size() == 1 ? " does not answer (" : " do not answer (", why, ")"}),
                       ranks);
    }
    throw *failure_;
  }

  MpiOptions options_;
  MPI_Comm collectives_ = MPI_COMM_NULL;
  MPI_Comm messages_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 1;
  std::vector<std::shared_ptr<Pending>> pending_;
  std::optional<RankError> failure_;
};

}  // namespace microreg::inline MICROREG_ABI
