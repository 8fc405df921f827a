/// @file
/// Whether the random numbers of a step were drawn by its own threads alone.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/record_function.h>
#include <microreg/step/call_watch.hpp>
#include <microreg/step/snapshot.hpp>

#include <mutex>
#include <unordered_map>

namespace microreg::inline MICROREG_ABI::detail {

/// While it lives, follows the state of generators from one operation of this thread that draws to the next. Where it
/// was moved in between, somebody else has drawn from them, who would get the same numbers again if they were put back.
/// Where that is not `wanted`, because steps before this one have drawn nothing, whoever moves them is taken for
/// somebody else.
class OwnDraws final : public CallWatch<OwnDraws> {
 public:
  static constexpr bool needs_inputs = false;

  OwnDraws(bool wanted, const GeneratorStates& beginning) : CallWatch(wanted), wanted_(wanted), last_(beginning) {}

  /// Does `work` without following it: what it draws, and puts back, is this step's own.
  template <class Work>
  static void around(const Work& work) {
    OwnDraws* const watch = current();
    if (watch == nullptr) {
      work();
      return;
    }
    watch->look();
    struct GoOn {
      OwnDraws& watch;
      ~GoOn() { watch.go_on(); }
    } behind{*watch};
    const Unwatched pause;
    work();
  }

  /// Whether it is so up to now.
  [[nodiscard]] bool alone() const { return alone_ && !last_.moved(); }
  /// Whether this step has drawn, or may have.
  [[nodiscard]] bool drawn() const { return wanted_ ? drawn_ : last_.moved(); }

 private:
  friend class CallWatch<OwnDraws>;

  void note(const at::RecordFunction& function) {
    if (draws(function)) {
      look();
    }
  }
  void note_end(const at::RecordFunction& function) {
    if (draws(function)) {
      go_on();
    }
  }
  void look() {
    const std::lock_guard lock(mutex_);
    drawn_ = true;
    alone_ = alone_ && !last_.moved();
  }
  void go_on() {
    const std::lock_guard lock(mutex_);
    if (alone_) {
      last_ = last_.now();
    }
  }

  /// Asked once for each operation: a schema keeps its name in one place.
  bool draws(const at::RecordFunction& function) {
    const std::lock_guard lock(mutex_);
    const char* const name = function.name();
    if (const auto known = known_.find(name); known != known_.end()) {
      return known->second;
    }
    const auto operation = function.operator_name();
    if (!operation.has_value()) {
      return false;
    }
    const auto handle = c10::Dispatcher::singleton().findSchema(*operation);
    return known_[name] = handle.has_value() && handle->hasTag(at::Tag::nondeterministic_seeded);
  }

  std::mutex mutex_;
  bool wanted_;
  bool alone_ = true;
  bool drawn_ = false;
  GeneratorStates last_;
  std::unordered_map<const char*, bool> known_;
};

}  // namespace microreg::inline MICROREG_ABI::detail
