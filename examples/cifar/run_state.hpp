/// @file
/// What a run carries from step to step, and its form in a checkpoint.
#pragma once

#include "models.hpp"
#include "records.hpp"

#include <torch/torch.h>

#include <microreg/distributed/communicator.hpp>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace cifar {

/// A mean over steps whose sum stays on the device until it is read. Of several ranks each adds its share.
struct RunningMean {
  torch::Tensor sum;
  std::int64_t count = 0;

  void add(const torch::Tensor& value);
  /// The sum of all ranks comes to rank 0, 0 to the others.
  void gather(microreg::Communicator& ranks);
  /// The mean; begins anew.
  double take();
};

/// Together with the options this is all that decides how a run goes on: the order of the data and every random number
/// are functions of seed and step (data_order.hpp, random_streams.hpp).
struct RunState {
  std::shared_ptr<ImageClassifier> model;
  std::shared_ptr<torch::optim::SGD> optimizer;
  std::int64_t step = 0;            ///< updates done
  std::vector<torch::Tensor> best;  ///< parameters and buffers at the best record so far; empty before the first
  Summary summary;                  ///< so far
  double step_seconds = 0;
  RunningMean loss;
  RunningMean gradient_norm;
  RunningMean penalty;
  std::int64_t metrics_bytes = 0;  ///< of metrics.jsonl
};

/// Parameters, then buffers.
[[nodiscard]] std::vector<torch::Tensor> tensors_of(const torch::nn::Module& module);

/// The same, as tensors of their own.
[[nodiscard]] std::vector<torch::Tensor> copies_of(const torch::nn::Module& module);

/// Copies the values of `from` into `to`, one by one.
void copy_tensors(const std::vector<torch::Tensor>& to, const std::vector<torch::Tensor>& from);

/// `state` and the run's config.json as bytes.
[[nodiscard]] std::string serialized(const RunState& state, const std::string& config);

/// The config.json in `bytes`. Throws CheckpointError. The reader is LibTorch's, and made for files that one trusts:
/// the checksum of a checkpoint tells a damaged one, not one that was made to do harm.
[[nodiscard]] std::string config_in(const std::string& bytes);

/// Sets `state`, which holds a model and an optimizer of the same kind, to what `bytes` say. Throws CheckpointError,
/// and has changed nothing then, where they are no run of that model. See config_in().
void restore(RunState& state, const std::string& bytes);

}  // namespace cifar
