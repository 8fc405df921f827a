/// @file
/// What a step may change before it is sure to succeed, and how to put it back.
#pragma once

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/core/Generator.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/Device.h>

#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace microreg::detail {

/// A copy of buffers and random number generators, bitwise. `restore()` puts them back in place.
class Snapshot {
 public:
  Snapshot(std::vector<at::Tensor> buffers, c10::Device device, const std::optional<at::Generator>& generator)
      : buffers_(std::move(buffers)) {
    const at::NoGradGuard no_grad;
    copies_.reserve(buffers_.size());
    for (const at::Tensor& buffer : buffers_) {
      copies_.push_back(buffer.defined() ? buffer.clone() : buffer);
    }
    save(at::globalContext().defaultGenerator(c10::kCPU));
    if (!device.is_cpu() && !device.is_meta()) {
      save(at::globalContext().defaultGenerator(device));
    }
    if (generator.has_value()) {
      save(*generator);
    }
  }

  void restore() {
    const at::NoGradGuard no_grad;
    for (std::size_t i = 0; i < buffers_.size(); ++i) {
      if (buffers_[i].defined()) {
        buffers_[i].copy_(copies_[i]);
      }
    }
    restore_generators();
  }

  void restore_generators() {
    for (auto& [generator, state] : generators_) {
      const std::scoped_lock lock(generator.mutex());
      generator.set_state(state);
    }
  }

 private:
  void save(at::Generator generator) {
    const std::scoped_lock lock(generator.mutex());
    generators_.emplace_back(generator, generator.get_state());
  }

  std::vector<at::Tensor> buffers_;
  std::vector<at::Tensor> copies_;
  std::vector<std::pair<at::Generator, at::Tensor>> generators_;
};

}  // namespace microreg::detail
