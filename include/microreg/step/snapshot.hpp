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

/// The states of every generator that a step may draw from: the default ones of the CPU and of the model's device, and
/// the one in the options.
class GeneratorStates {
 public:
  GeneratorStates(c10::Device device, const std::optional<at::Generator>& generator) {
    save(at::globalContext().defaultGenerator(c10::kCPU));
    if (!device.is_cpu() && !device.is_meta()) {  // the meta device has no generator
      save(at::globalContext().defaultGenerator(device));
    }
    if (generator.has_value()) {
      save(*generator);
    }
  }

  /// The states that the same generators are in now.
  [[nodiscard]] GeneratorStates now() const {
    GeneratorStates result;
    for (const auto& saved : states_) {
      result.save(saved.first);
    }
    return result;
  }

  void restore() const {
    for (const auto& [saved, state] : states_) {
      at::Generator generator = saved;
      const std::scoped_lock lock(generator.mutex());
      generator.set_state(state);
    }
  }

 private:
  GeneratorStates() = default;

  void save(at::Generator generator) {
    const std::scoped_lock lock(generator.mutex());
    states_.emplace_back(generator, generator.get_state());
  }

  std::vector<std::pair<at::Generator, at::Tensor>> states_;
};

/// A copy of buffers and random number generators, bitwise. `restore()` puts them back in place.
class Snapshot {
 public:
  Snapshot(const std::vector<at::Tensor>& buffers, c10::Device device, const std::optional<at::Generator>& generator)
      : generators_(device, generator) {
    for (const at::Tensor& buffer : buffers) {
      if (buffer.defined()) {
        buffers_.push_back(buffer);
      }
    }
    copy_buffers();
  }

  /// A copy of the same things as they are now.
  [[nodiscard]] Snapshot now() const { return {buffers_, generators_.now()}; }

  void restore() const {
    restore_buffers();
    generators_.restore();
  }

  void restore_buffers() const {
    const at::NoGradGuard no_grad;
    if (!buffers_.empty()) {
      at::_foreach_copy_(buffers_, copies_);
    }
  }

  [[nodiscard]] const GeneratorStates& generators() const noexcept { return generators_; }

 private:
  Snapshot(std::vector<at::Tensor> buffers, GeneratorStates generators)
      : buffers_(std::move(buffers)), generators_(std::move(generators)) {
    copy_buffers();
  }

  void copy_buffers() {
    const at::NoGradGuard no_grad;
    copies_.reserve(buffers_.size());
    for (const at::Tensor& buffer : buffers_) {
      copies_.push_back(buffer.clone());
    }
  }

  std::vector<at::Tensor> buffers_;
  std::vector<at::Tensor> copies_;
  GeneratorStates generators_;
};

}  // namespace microreg::detail
