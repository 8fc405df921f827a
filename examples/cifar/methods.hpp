/// @file
/// What each --method does in a step.
#pragma once

#include "models.hpp"
#include "options.hpp"
#include "recorded_norms.hpp"

#include <microreg/microreg.hpp>

#include <memory>
#include <optional>

namespace cifar {

/// One update of the weights on a mini-batch, as `options.method` has it. Methods without a penalty are a penalty of
/// strength 0: measured, not differentiated, the same code path at the cost of a plain step.
class Step {
 public:
  /// Throws DataError if recorded norms cannot be read.
  Step(const Options& options, const std::shared_ptr<ImageClassifier>& model,
       std::shared_ptr<torch::optim::SGD> optimizer, std::shared_ptr<microreg::Communicator> ranks = nullptr);

  /// The images are those of this rank. What it does depends on `step`, weights and mini-batch alone, and on LibTorch's
  /// default random numbers. Throws microreg::NonFiniteError, the weights unchanged, if it diverges.
  microreg::Report operator()(std::int64_t step, const torch::Tensor& images, const torch::Tensor& labels);

 private:
  void graft(std::int64_t step, const microreg::Report& report) const;

  Options options_;
  std::shared_ptr<ImageClassifier> model_;
  std::shared_ptr<torch::optim::SGD> optimizer_;
  std::shared_ptr<microreg::Communicator> ranks_;
  microreg::Regularizer<> regularizer_;
  std::optional<RecordedNorms> norms_;  // of external grafting
};

}  // namespace cifar
