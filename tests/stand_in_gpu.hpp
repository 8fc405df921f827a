/// @file
/// A GPU that is none, for machines without one: with LibTorch's build for the CPU and the environment variable
/// MICROREG_STAND_IN_GPU, the device "cuda" exists. Its memory cannot be read by the host, its kernels are those of the
/// CPU, its backward passes run in the engine's threads for devices, its generator is its own, and tensors of the two
/// devices do not mix. What it has not: other kernels, cuDNN, work that goes on while the host does, CUDA graphs (but
/// what may not happen while one is recorded is an error).
#pragma once

#include <cstdint>

namespace helpers {

/// Makes it, if the environment variable says so and LibTorch has no CUDA of its own.
void make_stand_in_gpu();

/// Whether there is one.
[[nodiscard]] bool has_stand_in_gpu();

/// Whether this thread is inside of one of its kernels.
[[nodiscard]] bool in_stand_in_kernel();

/// Whether what would make the host wait for it is an error: in the whole process.
void make_stand_in_waits_an_error(bool errors);

/// While it lives, this thread works on a stream of its own, and what CUDA refuses while such a stream is recorded as a
/// graph is an error: waiting for the device, another stream that waits for this one, kernels on another. Nothing where
/// there is no stand-in.
class RecordedOnStandIn {
 public:
  RecordedOnStandIn();
  RecordedOnStandIn(const RecordedOnStandIn&) = delete;
  RecordedOnStandIn& operator=(const RecordedOnStandIn&) = delete;
  ~RecordedOnStandIn();

 private:
  std::int64_t before_ = 0;
};

}  // namespace helpers
