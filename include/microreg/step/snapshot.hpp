/// @file
/// What a step may change before it is sure to succeed, and how to put it back.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/Device.h>
#include <c10/util/Exception.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/hash.hpp>
#include <microreg/detail/version_of.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <iterator>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// Whether two tensors on the CPU, of one shape and type, hold the same bits: NaN equals itself, and nothing is
/// dispatched.
inline bool same_bytes(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.contiguous(), y = b.contiguous();
  return x.nbytes() == y.nbytes() &&
         (x.nbytes() == 0 || std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0);
}

/// The states of every generator that a step may draw from: the default ones of the CPU and of the model's devices, and
/// the one in the options.
class GeneratorStates {
 public:
  GeneratorStates(const std::vector<c10::Device>& devices, const std::optional<at::Generator>& generator) {
    save(at::globalContext().defaultGenerator(c10::kCPU));
    for (const c10::Device& device : devices) {
      if (!device.is_cpu() && !device.is_meta()) {  // the meta device has no generator
        save(at::globalContext().defaultGenerator(device));
      }
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

  /// Whether numbers were drawn since.
  [[nodiscard]] bool moved() const {
    return std::any_of(states_.begin(), states_.end(), [](const auto& saved) {
      at::Generator generator = saved.first;
      const std::scoped_lock lock(generator.mutex());
      return !same_bytes(generator.get_state(), saved.second);
    });
  }

  /// What one generator was, by which others are told apart from it.
  struct Digest {
    std::uint64_t state;    ///< a hash of what was saved
    const void* generator;  ///< which one it is
    bool moved;             ///< since
  };
  [[nodiscard]] std::vector<Digest> digests() const {
    std::vector<Digest> result;
    for (const auto& [saved, state] : states_) {
      at::Generator generator = saved;
      const std::scoped_lock lock(generator.mutex());
      Hash hash;
      hash.add(state.const_data_ptr(), state.nbytes());  // bytes on the host, whatever the device
      result.push_back({hash.value(), generator.unsafeGetGeneratorImpl(), !same_bytes(generator.get_state(), state)});
    }
    return result;
  }

  /// Sets those that have moved.
  void restore() const {
    for (const auto& [saved, state] : states_) {
      at::Generator generator = saved;
      const std::scoped_lock lock(generator.mutex());
      if (!same_bytes(generator.get_state(), state)) {
        generator.set_state(state);
      }
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

/// Warns while an error is on its way: a handler of warnings may throw, and replaces none.
template <class Warn>
void without_errors(const Warn& warn) noexcept {
  try {
    warn();
  } catch (...) {
  }
}

/// The tensor without the repetitions of expand(), which cannot be written to.
inline at::Tensor without_repetitions(at::Tensor tensor) {
  if (tensor.layout() == at::kStrided) {
    for (std::int64_t d = 0; d < tensor.dim(); ++d) {
      tensor = tensor.stride(d) == 0 && tensor.size(d) > 1 ? tensor.narrow(d, 0, 1) : tensor;
    }
  }
  return tensor;
}

/// A copy of one tensor: of what its memory holds, and of how it lies there.
///
/// On the CPU it is compared byte by byte before it is put back, since not everything that writes counts a version
/// (batch normalisation does not); on a device, where comparing would wait, it is put back always, and what is no plain
/// memory by its version. Putting back does not count: the values are those that other graphs have saved, so that these
/// stay valid.
class SavedTensor {
 public:
  static constexpr std::size_t large = std::size_t{1} << 20;  ///< bytes

  explicit SavedTensor(const at::Tensor& tensor) : SavedTensor(tensor, nullptr) {}
  /// The same as `earlier` where that is still true, without copying again.
  SavedTensor(const at::Tensor& tensor, const SavedTensor* earlier)
      : tensor_(tensor), version_(version_of(tensor)), alias_(tensor.variable_data()) {
    if (earlier != nullptr && is_reusable() && earlier->version_ == version_ && earlier->lies_the_same() &&
        (!is_plain() || same_bytes(without_repetitions(alias_), earlier->copy_))) {
      copy_ = earlier->copy_;
    } else {
      copy_ = without_repetitions(alias_).clone();
    }
  }

  [[nodiscard]] const at::Tensor& tensor() const noexcept { return tensor_; }
  /// The values that it had, without the repetitions of expand().
  [[nodiscard]] const at::Tensor& before() const noexcept { return copy_; }
  /// Whether values can be compared; versions tell of the others.
  [[nodiscard]] bool is_plain() const { return alias_.layout() == at::kStrided; }
  /// Whether a copy is worth keeping, and can be compared without waiting.
  [[nodiscard]] bool is_reusable() const { return !is_plain() || (alias_.is_cpu() && alias_.nbytes() >= large); }
  [[nodiscard]] bool changed() const { return version_of(tensor_) != version_; }

  /// `between`: what it may have been put back to since, which no version tells.
  void restore(const SavedTensor* between = nullptr) const {
    if (!lies_the_same()) {
      at::Tensor(tensor_).set_data(alias_);
    }
    const bool on_device = is_plain() && !alias_.is_cpu();
    if (on_device || differs() || (between != nullptr && between->version_ != version_)) {
      without_repetitions(alias_).copy_(copy_);
    }
  }

  /// Whether it may hold other values now. Waits for a device.
  [[nodiscard]] bool differs() const {
    if (!is_plain()) {
      return changed();
    }
    const at::Tensor now = without_repetitions(alias_);
    return alias_.is_cpu() ? !same_bytes(now, copy_) : changed() || !now.equal(copy_);
  }

 private:
  [[nodiscard]] bool lies_the_same() const {
    if (alias_.layout() != at::kStrided || tensor_.layout() != at::kStrided) {
      return alias_.layout() == tensor_.layout();
    }
    return tensor_.storage().is_alias_of(alias_.storage()) && tensor_.sizes() == alias_.sizes() &&
           tensor_.strides() == alias_.strides() && tensor_.storage_offset() == alias_.storage_offset() &&
           tensor_.scalar_type() == alias_.scalar_type();
  }

  at::Tensor tensor_;
  std::uint64_t version_;
  at::Tensor alias_;  // the same memory, with a version of its own
  at::Tensor copy_;
};

/// What stays between the steps of one object: copies of large tensors, which are taken again only where these have
/// changed, which parameters the model writes to in its forward pass, and whether random numbers are drawn.
struct SnapshotMemory {
  std::vector<SavedTensor> large;
  std::vector<at::Tensor> written;  ///< parameters, frozen ones among them
  bool first = true;
  bool alike = false;  ///< on all ranks, where there are several
  bool draws = true;   ///< the last step did
};

/// The devices of `tensors`, each once.
inline std::vector<c10::Device> devices_of(const std::vector<at::Tensor>& tensors) {
  std::vector<c10::Device> result;
  for (const at::Tensor& tensor : tensors) {
    if (std::find(result.begin(), result.end(), tensor.device()) == result.end()) {
      result.push_back(tensor.device());
    }
  }
  return result;
}

/// A copy of buffers, parameters and random number generators, bitwise. `restore()` puts back, in place, those that
/// have changed.
class Snapshot {
 public:
  Snapshot(const std::vector<at::Tensor>& buffers, const std::vector<at::Tensor>& parameters,
           const std::vector<c10::Device>& devices, const std::optional<at::Generator>& generator,
           SnapshotMemory* memory = nullptr)
      : generators_(devices, generator) {
    const at::NoGradGuard no_grad;
    std::unordered_set<const c10::TensorImpl*> seen;
    std::unordered_map<const c10::TensorImpl*, const SavedTensor*> earlier;
    if (memory != nullptr) {
      for (const SavedTensor& saved : memory->large) {
        earlier.emplace(saved.tensor().unsafeGetTensorImpl(), &saved);
      }
    }
    for (const at::Tensor& tensor : buffers) {
      if (tensor.defined() && seen.insert(tensor.unsafeGetTensorImpl()).second) {
        const auto known = earlier.find(tensor.unsafeGetTensorImpl());
        saved_.emplace_back(tensor, known == earlier.end() ? nullptr : known->second);
      }
    }
    if (memory != nullptr) {
      memory->large.clear();
      std::copy_if(saved_.begin(), saved_.end(), std::back_inserter(memory->large),
                   [](const SavedTensor& saved) { return saved.is_reusable(); });
    }
    buffers_ = static_cast<std::ptrdiff_t>(saved_.size());
    for (const at::Tensor& tensor : parameters) {
      if (tensor.defined() && seen.insert(tensor.unsafeGetTensorImpl()).second) {
        saved_.emplace_back(tensor);
      }
    }
  }

  /// A copy of the same buffers and generators as they are now. Not of parameters: those that a first pass has
  /// projected are to stay so in further ones.
  [[nodiscard]] Snapshot buffers_now() const {
    const at::NoGradGuard no_grad;
    Snapshot result(generators_.now());
    for (auto saved = saved_.begin(); saved != saved_.begin() + buffers_; ++saved) {
      result.saved_.emplace_back(saved->tensor(), &*saved);
    }
    result.buffers_ = buffers_;
    return result;
  }

  void restore() const {
    restore_buffers();
    generators_.restore();
  }

  /// The same; but generators from which others have drawn stay as they are, so that nobody gets numbers twice.
  void restore(bool alone) const {
    restore_buffers();
    if (alone) {
      generators_.restore();
    } else {
      TORCH_WARN_ONCE(
          "microreg does not put random number generators back, since another thread may have drawn from them "
          "meanwhile and would get the same numbers again");
    }
  }

  void restore_buffers() const {
    const at::NoGradGuard no_grad;
    for (const SavedTensor& saved : saved_) {
      saved.restore();
    }
  }

  /// The same after `other` has been restored.
  void restore_buffers_over(const Snapshot& other) const {
    const at::NoGradGuard no_grad;
    for (const SavedTensor& saved : saved_) {
      saved.restore(saved.is_plain() ? nullptr : other.find(saved.tensor()));
    }
  }

  /// The same as restore() while an error is on its way, which no other one replaces.
  void restore_after_error(bool alone = true) const noexcept {
    try {
      restore(alone);
    } catch (const std::exception& error) {
      without_errors([&] { TORCH_WARN("microreg could not put everything back after an error: ", error.what()); });
    } catch (...) {
    }
  }

  /// How many of them an operation in place has written to since.
  [[nodiscard]] std::size_t changes() const {
    return static_cast<std::size_t>(
        std::count_if(saved_.begin(), saved_.end(), [](const SavedTensor& saved) { return saved.changed(); }));
  }

  /// What was saved of `tensor`; null if that is not one of those.
  [[nodiscard]] const SavedTensor* find(const at::Tensor& tensor) const {
    const auto found = std::find_if(saved_.begin(), saved_.end(),
                                    [&](const SavedTensor& saved) { return saved.tensor().is_same(tensor); });
    return found == saved_.end() ? nullptr : &*found;
  }

  /// Lets the copies of parameters go that nothing has written to, before gradients need the memory.
  void forget_unchanged_parameters() {
    saved_.erase(std::remove_if(saved_.begin() + buffers_, saved_.end(),
                                [](const SavedTensor& saved) { return !saved.changed(); }),
                 saved_.end());
  }

  [[nodiscard]] const GeneratorStates& generators() const noexcept { return generators_; }

 private:
  explicit Snapshot(GeneratorStates generators) : generators_(std::move(generators)) {}

  std::vector<SavedTensor> saved_;  // buffers first
  std::ptrdiff_t buffers_ = 0;
  GeneratorStates generators_;
};

}  // namespace microreg::inline MICROREG_ABI::detail
