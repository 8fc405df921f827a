// What a step holds at its peak, counted in bytes by LibTorch's allocator: the same on every machine.
#include "helpers.hpp"

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <microreg/microreg.hpp>

#include <algorithm>
#include <memory>

namespace {

class Peak : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void* /*pointer*/, std::int64_t bytes, std::size_t, std::size_t, c10::Device) override {
    now_ += bytes;
    peak_ = std::max(peak_, now_);
  }
  [[nodiscard]] bool memoryProfilingEnabled() const override { return true; }
  [[nodiscard]] std::int64_t bytes() const { return peak_; }

 private:
  std::int64_t now_ = 0;
  std::int64_t peak_ = 0;
};

template <class Step>
std::int64_t peak_of(const Step& step) {
  const auto peak = std::make_shared<Peak>();
  const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, peak);
  step();
  return peak->bytes();
}

torch::nn::Sequential layers(int count, std::int64_t width) {
  torch::nn::Sequential model;
  for (int i = 0; i < count; ++i) {
    model->push_back(torch::nn::Linear(width, width));
    model->push_back(torch::nn::ReLU());
  }
  return model;
}

std::int64_t peak_of_exact(torch::nn::Sequential& model, const torch::Tensor& x, std::int64_t micro_batch) {
  const auto loss = [](const torch::Tensor& y, const torch::Tensor& target) { return (y - target).square().mean(); };
  microreg::Regularizer regularizer(model, loss, microreg::GradientNorm{},
                                    {.strength = 0.1, .micro_batch_size = micro_batch});
  return peak_of([&] { regularizer.backward(x, torch::zeros_like(x)); });
}

}  // namespace

TEST_CASE("in an exact step the old gradients make room for the new ones", "[memory]") {
  if (skipped_off_the_cpu("counts the bytes that the CPU gives")) {
    return;
  }
  auto model = layers(12, 128);
  std::int64_t parameters = 0;
  for (const torch::Tensor& parameter : model->parameters()) {
    parameters += 4 * parameter.numel();
  }
  const torch::Tensor x = torch::randn({2, 128});
  // Each gradient once, a layer's twice in passing; held to the end of the pass they would be there twice.
  CHECK(static_cast<double>(peak_of_exact(model, x, 2)) < 1.5 * static_cast<double>(parameters));
}

TEST_CASE("the memory of an exact step is set by the micro-batch, not by the batch", "[memory]") {
  if (skipped_off_the_cpu("counts the bytes that the CPU gives")) {
    return;
  }
  auto model = layers(12, 16);
  const auto peak = [&](std::int64_t batch) {
    model->zero_grad();
    return peak_of_exact(model, torch::randn({batch, 16}), 64);
  };
  const std::int64_t one = peak(64);
  CHECK(static_cast<double>(peak(64 * 8)) < 1.5 * static_cast<double>(one));
  CHECK(static_cast<double>(peak_of_exact(model, torch::randn({64 * 8, 16}), 64 * 8)) > 4 * static_cast<double>(one));
}
