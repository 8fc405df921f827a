/// @file
/// GateTape: what every operation of a forward pass that decides something decided.
#pragma once

#include <ATen/core/Tensor.h>
#include <microreg/detail/version_of.hpp>
#include <microreg/error.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI {

namespace detail {
class GateSession;
}  // namespace detail

/// The gates of one forward pass, in the order of its operations: which units of a ReLU were on, which element each
/// max pooling took, what a comparison gave, which random numbers were drawn. Filled by RecordGates, read by
/// ReplayGates.
///
/// A gate is the tensor that autograd keeps for the operation's own gradient if there is one (a ReLU's result, a
/// clamp's input, a max pooling's indices), else a mask or a copy. A tape holds no autograd graph, but keeps these
/// tensors until a replay releases them.
class GateTape {
 public:
  /// One operation that decided or drew something.
  struct Entry {
    const char* operation;                ///< as LibTorch names it, without namespace and overload: "relu", "relu_"
    std::vector<std::int64_t> sizes;      ///< of the first operand
    std::vector<at::Tensor> gates;        ///< empty once a replay has released them
    std::vector<std::uint64_t> versions;  ///< of the gates, to notice that one was overwritten
    bool may_be_left_out;                 ///< by a second pass: it decided nothing that carries a gradient
    const void* node;                     ///< of the operation in the autograd graph, or null; never dereferenced
    std::uint64_t sequence_number;        ///< of that node, since another may come to lie at its address
    bool drawn = false;                   ///< random numbers, rather than a decision
  };

  GateTape() = default;
  GateTape(const GateTape&) = delete;  // Scopes hold its address.
  GateTape& operator=(const GateTape&) = delete;
  ~GateTape() = default;

  [[nodiscard]] bool empty() const noexcept { return entries_.empty(); }                 ///< no operation had gates
  [[nodiscard]] std::size_t size() const noexcept { return entries_.size(); }            ///< operations with gates
  [[nodiscard]] const std::vector<Entry>& entries() const noexcept { return entries_; }  ///< in the operations' order
  /// Over how few elements the pass normalised, in a type coarser than float64 (microreg/gates/normalisations.hpp); a
  /// large number if it did not.
  [[nodiscard]] std::int64_t fewest_normalised() const noexcept { return fewest_normalised_; }
  /// Lets all gates go, as a RecordGates does when it begins.
  void clear() noexcept {
    entries_.clear();
    fewest_normalised_ = std::numeric_limits<std::int64_t>::max();
  }

 private:
  friend class detail::GateSession;
  std::vector<Entry> entries_;
  std::int64_t fewest_normalised_ = std::numeric_limits<std::int64_t>::max();
};

/// What a replay does with the gates that it has used.
enum class Keep {
  no,   ///< release them: the last replay of this tape
  yes,  ///< keep them for another replay
};

namespace detail {

/// What the gates of one operation hold.
using GateTensors = std::vector<at::Tensor>;

/// What a session records and replays.
enum class Frozen {
  all,        ///< decisions and draws, and what enters a graph without one
  decisions,  ///< and draws that choose: bernoulli, multinomial, the slopes of rrelu
  draws,      ///< random numbers alone; a tape with decisions may be replayed so too
};

inline std::string describe_operation(const char* operation, const std::vector<std::int64_t>& sizes) {
  std::ostringstream out;
  out << operation << " of a tensor of shape " << at::IntArrayRef(sizes);
  return out.str();
}

/// One pass over a tape: what the scopes hold and the kernels talk to.
class GateSession {
 public:
  enum class Pass { record, replay };

  GateSession(GateTape& tape, Pass pass, Keep keep, Frozen frozen)
      : tape_(&tape), pass_(pass), keep_(keep), frozen_(frozen) {
    if (pass == Pass::record) {
      tape.clear();
    }
  }

  [[nodiscard]] bool replays() const noexcept { return pass_ == Pass::replay; }
  [[nodiscard]] bool holds_decisions() const noexcept { return frozen_ != Frozen::draws; }
  [[nodiscard]] bool holds_draws() const noexcept { return frozen_ != Frozen::decisions; }
  [[nodiscard]] bool holds_constants() const noexcept { return frozen_ == Frozen::all && !composing_; }

  /// Notes that a replay gives the values in this memory again.
  void reproduced(const at::Tensor& tensor) {
    if (frozen_ == Frozen::all && tensor.has_storage()) {
      reproduced_.emplace(tensor.storage().unsafeGetStorageImpl(), tensor.storage().getWeakStorageImpl());
    }
  }
  [[nodiscard]] bool reproduces(const at::Tensor& tensor) const {
    return tensor.has_storage() && reproduced_.contains(tensor.storage().unsafeGetStorageImpl());
  }

  /// While it lives, an operation is being composed of others, in one pass with a graph and in the other without.
  class Composing {
   public:
    explicit Composing(GateSession& session) : session_(session), before_(std::exchange(session.composing_, true)) {}
    Composing(const Composing&) = delete;
    Composing& operator=(const Composing&) = delete;
    ~Composing() { session_.composing_ = before_; }

   private:
    GateSession& session_;
    bool before_;
  };

  void record(GateTape::Entry entry) {
    for (const at::Tensor& gate : entry.gates) {
      entry.versions.push_back(version_of(gate));
    }
    tape_->entries_.push_back(std::move(entry));
  }

  /// Throws GateError: the first pass had another operation there.
  [[noreturn]] void fail(const char* operation, const std::vector<std::int64_t>& sizes) const {
    const std::string found = describe_operation(operation, sizes);
    const std::size_t size = tape_->entries_.size();
    throw GateError("the second pass does not repeat the first: its operation " + std::to_string(position_) +
                    " with gates is " + found + ", but the first pass had " +
                    (position_ < size ? describe(position_) + " there"
                                      : "no more than " + std::to_string(size) + " such operations") +
                    advice);
  }

  /// The gates of the next operation of the first pass, which has to be this one.
  GateTensors next(const char* operation, const std::vector<std::int64_t>& sizes) {
    if (!skip_to(operation, sizes)) {
      fail(operation, sizes);
    }
    GateTape::Entry& entry = tape_->entries_[position_];
    if (entry.gates.empty()) {
      throw GateError("the gates of operation " + std::to_string(position_) + ", " + describe(position_) +
                      ", were released by an earlier replay: pass Keep::yes to every replay but the last");
    }
    for (std::size_t i = 0; i < entry.gates.size(); ++i) {
      if (version_of(entry.gates[i]) != entry.versions[i]) {
        throw GateError("the output of operation " + std::to_string(position_) + ", " + describe(position_) +
                        ", was changed in place after the first pass recorded it: use the operation out of place");
      }
    }
    ++position_;
    // Draws stay: they are small, and a pass at the first point needs them without the decisions.
    return keep_ == Keep::yes || entry.drawn ? entry.gates : std::exchange(entry.gates, {});
  }

  /// The same for an operation that the first pass need not have had: nothing then.
  std::optional<GateTensors> next_if_there(const char* operation, const std::vector<std::int64_t>& sizes) {
    return skip_to(operation, sizes) ? std::optional(next(operation, sizes)) : std::nullopt;
  }

  /// Notes that so many elements were normalised together.
  void normalised(std::int64_t elements) noexcept {
    tape_->fewest_normalised_ = std::min(tape_->fewest_normalised_, elements);
  }

  [[nodiscard]] bool at_beginning() const noexcept { return position_ == 0; }

  void finish() const {
    for (std::size_t i = position_; i < tape_->entries_.size(); ++i) {
      if (!passes_over(tape_->entries_[i])) {
        throw GateError("the second pass does not repeat the first: it ended after " + std::to_string(i) + " of " +
                        std::to_string(tape_->entries_.size()) + " operations with gates, where the first had " +
                        describe(i) + advice);
      }
    }
  }

 private:
  static constexpr const char* advice =
      "; both passes have to call the same operations on the same shapes in the same order";

  [[nodiscard]] std::string describe(std::size_t position) const {
    const GateTape::Entry& entry = tape_->entries_[position];
    return describe_operation(entry.operation, entry.sizes);
  }

  [[nodiscard]] bool passes_over(const GateTape::Entry& entry) const {
    return entry.may_be_left_out || (frozen_ == Frozen::draws && !entry.drawn);
  }

  /// Moves on to the entry of this operation if only such lie between that a second pass may leave out.
  bool skip_to(const char* operation, const std::vector<std::int64_t>& sizes) {
    for (std::size_t i = position_; i < tape_->entries_.size(); ++i) {
      const GateTape::Entry& entry = tape_->entries_[i];
      if (std::string_view(entry.operation) == operation && entry.sizes == sizes) {
        position_ = i;
        return true;
      }
      if (!passes_over(entry)) {
        break;
      }
    }
    return false;
  }

  GateTape* tape_;
  Pass pass_;
  Keep keep_;
  Frozen frozen_;
  std::size_t position_ = 0;
  bool composing_ = false;
  /// Held weakly, so that no other memory comes to have one's address meanwhile.
  std::unordered_map<const c10::StorageImpl*, c10::weak_intrusive_ptr<c10::StorageImpl>> reproduced_;
};

/// What the kernels of this shared object look at; they may not be the registered ones: gate_session_of_kernels().
inline thread_local GateSession* active_gate_session = nullptr;

}  // namespace detail

}  // namespace microreg::inline MICROREG_ABI
