/// @file
/// Communicator: what the processes of one training do together. Engines have adapters in this folder, none of which is
/// in microreg.hpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <microreg/version.hpp>

#include <cstdint>
#include <functional>
#include <string>

namespace microreg::inline MICROREG_ABI {

/// The processes, called ranks, that take each step together: rank() of size(), counted from 0. Handed to a Regularizer
/// as the option `communicator`.
///
/// Collectives are called on every rank in the same order. Where another rank fails or does not answer they throw
/// RankError, within a time of the engine's own, and from then on always. Derive from it for an engine that has no
/// adapter here: five functions.
class Communicator {
 public:
  Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;
  virtual ~Communicator() = default;

  [[nodiscard]] virtual std::int64_t rank() const = 0;  ///< of this process, in [0, size())
  [[nodiscard]] virtual std::int64_t size() const = 0;  ///< how many ranks there are

  /// Begins to add `flat` up over all ranks, in place: [N], contiguous, of one N and type on all ranks. The function
  /// that it returns waits for the end, and is to be called once.
  [[nodiscard]] std::function<void()> all_reduce(const at::Tensor& flat) {
    bytes_ += flat.nbytes();
    return begin_all_reduce(flat);
  }
  /// Overwrites `flat`, [N], contiguous, with that of rank `root`.
  void broadcast(const at::Tensor& flat, std::int64_t root) {
    bytes_ += flat.nbytes();
    do_broadcast(flat, root);
  }
  /// Tells the ranks that wait for this one, or will, that it does not come any more, and why.
  virtual void abandon(const std::string& why) noexcept = 0;

  /// The bytes that this rank has handed to collectives so far.
  [[nodiscard]] std::uint64_t bytes() const noexcept { return bytes_; }

 private:
  virtual std::function<void()> begin_all_reduce(const at::Tensor& flat) = 0;
  virtual void do_broadcast(const at::Tensor& flat, std::int64_t root) = 0;

  std::uint64_t bytes_ = 0;
};

}  // namespace microreg::inline MICROREG_ABI
