/// @file
/// The errors that microreg throws. Each message says what was wrong, with which field, tensor or parameter, the
/// value that was found, and what to do about it.
#pragma once

#include <microreg/version.hpp>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI {

/// Base of all errors of this library. When `Regularizer::backward` or `measure` throws one, the model, its buffers,
/// the `.grad` fields and the random number generators are as they were before the call.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// An option has a value that cannot be used: the message names the field.
class OptionError : public Error {
 public:
  using Error::Error;
};

/// A mini-batch cannot be split: empty, first dimensions that differ, a tensor on the wrong device.
class BatchError : public Error {
 public:
  using Error::Error;
};

/// The model, its output, the loss or a probe cannot be differentiated as the penalty needs.
class ModelError : public Error {
 public:
  using Error::Error;
};

/// The second forward pass of a finite difference does not repeat the gates of the first: the message names the
/// operation.
class GateError : public ModelError {
 public:
  using ModelError::ModelError;
};

/// A difference does not agree with exact double backward of the same micro-batch, or its passes do not repeat each
/// other: the message says by how much, in which parameters, and why that may be.
class DifferenceError : public ModelError {
 public:
  using ModelError::ModelError;
};

/// A loss, a penalty or a gradient is NaN or infinite.
class NonFiniteError : public Error {
 public:
  /// `micro_batch`: an index counted from 0, which micro_batch() then gives.
  NonFiniteError(const std::string& message, std::int64_t micro_batch) : Error(message), micro_batch_(micro_batch) {}

  /// Index, within its mini-batch, of the first micro-batch that went wrong.
  [[nodiscard]] std::int64_t micro_batch() const noexcept { return micro_batch_; }

 private:
  std::int64_t micro_batch_;
};

/// Of several processes that take a step together, another one has failed in it, or does not answer.
class RankError : public Error {
 public:
  /// `ranks`: those that failed, as far as that is known, which ranks() then gives.
  RankError(const std::string& message, std::vector<std::int64_t> ranks) : Error(message), ranks_(std::move(ranks)) {}

  /// Those that failed or do not answer; empty where that could not be found out.
  [[nodiscard]] const std::vector<std::int64_t>& ranks() const noexcept { return ranks_; }

 private:
  std::vector<std::int64_t> ranks_;
};

}  // namespace microreg::inline MICROREG_ABI
