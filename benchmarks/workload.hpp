/// @file
/// A network with one mini-batch, and the plain step on it.
#pragma once

#include "case.hpp"
#include "networks.hpp"

#include <optional>
#include <string>

namespace overhead {

struct Workload {
  std::shared_ptr<cifar::ImageClassifier> model;
  torch::Tensor images;
  torch::Tensor labels;
  std::int64_t micro_batch;
  std::optional<at::ScalarType> autocast;
};

/// The network and the data of a case, drawn from a fixed seed, in its layout and on its device.
[[nodiscard]] Workload make_workload(const Case& which);

/// What every step is compared with: zeroed gradients, forward, loss and backward as LibTorch alone does them, one
/// micro-batch after another. Returns the mean loss.
torch::Tensor plain_step(const Workload& workload);

/// Waits until the device has done what it was asked to.
void synchronise(const Workload& workload);

/// Writes every parameter in order (float32), the images (float32, NCHW) and the labels (int64), raw, one after
/// another: what a program in another language needs to repeat the step.
void write_state(const Workload& workload, const std::string& file);

}  // namespace overhead
