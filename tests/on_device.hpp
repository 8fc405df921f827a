/// @file
/// Where the tests run: on the CPU, or on the device that the environment variable MICROREG_TEST_DEVICE names.
#pragma once

#include <ATen/Context.h>
#include <torch/types.h>

#include <cstdint>
#include <optional>

namespace helpers {

/// The device of tensors that a test makes without saying where.
[[nodiscard]] at::Device test_device();

/// Whether there is no GPU; if so, says that the test is skipped.
[[nodiscard]] bool no_device();

/// Whether tensors lie elsewhere than on the CPU, and a test that is about the CPU is skipped; it says so, with `why`.
[[nodiscard]] bool skipped_off_the_cpu(const char* why);

/// Where a test of what a device computes runs: on the GPU, or where the environment variable MICROREG_REHEARSE says,
/// which tries the test itself without one; else nowhere.
[[nodiscard]] std::optional<at::Device> device_to_test();

/// While it lives, whatever makes the host wait for the GPU is an error.
class NoWaiting {
 public:
  /// Whether it can be seen here: with CUDA's headers, or on a stand-in for a GPU.
  [[nodiscard]] static bool is_seen();
  NoWaiting();
  NoWaiting(const NoWaiting&) = delete;
  NoWaiting& operator=(const NoWaiting&) = delete;
  ~NoWaiting();
};

/// While it lives, cuDNN is not used: its recurrent networks have no second derivative, and are refused with this as
/// the remedy.
class WithoutCudnn {
 public:
  WithoutCudnn() : before_(at::globalContext().userEnabledCuDNN()) { at::globalContext().setUserEnabledCuDNN(false); }
  WithoutCudnn(const WithoutCudnn&) = delete;
  WithoutCudnn& operator=(const WithoutCudnn&) = delete;
  ~WithoutCudnn() { at::globalContext().setUserEnabledCuDNN(before_); }

 private:
  bool before_;
};

/// torch::tensor() on it. That one writes its values from the host, wherever it made room for them.
[[nodiscard]] inline at::Tensor tensor(const torch::detail::TensorDataContainer& values,
                                       torch::TensorOptions options = {}) {
  return torch::tensor(values, options.device(at::kCPU)).to(test_device());
}

/// torch::randn() on it, of the CPU's numbers: the same on every device, where what rounding leaves depends on them.
[[nodiscard]] inline at::Tensor randn_of_the_cpu(at::IntArrayRef sizes, at::ScalarType type = at::kFloat,
                                                 const std::optional<at::Generator>& generator = std::nullopt) {
  return torch::randn(sizes, generator, torch::TensorOptions(at::kCPU).dtype(type)).to(test_device());
}

/// A generator of that device.
[[nodiscard]] at::Generator generator(std::uint64_t seed);

}  // namespace helpers
