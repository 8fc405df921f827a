/// @file
/// Independent random number streams out of one seed. A draw depends on the seed, its purpose and its index (a step, an
/// epoch) alone, so what one part of the trainer draws never moves another.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Generator.h>

#include <cstdint>
#include <mutex>

namespace cifar {

enum class Stream : std::uint64_t {
  weights,
  order,
  augmentation,
  penalty,
  probe,
  synthetic_train,
  synthetic_test,
  step,
};

/// A seed for `stream`, by the splitmix64 finaliser.
[[nodiscard]] constexpr std::uint64_t stream_seed(std::int64_t seed, Stream stream, std::int64_t index = 0) noexcept {
  std::uint64_t state = static_cast<std::uint64_t>(seed);
  for (const std::uint64_t part : {static_cast<std::uint64_t>(stream), static_cast<std::uint64_t>(index)}) {
    state += 0x9e3779b97f4a7c15U * (part + 1);
    state = (state ^ (state >> 30U)) * 0xbf58476d1ce4e5b9U;
    state = (state ^ (state >> 27U)) * 0x94d049bb133111ebU;
    state ^= state >> 31U;
  }
  return state;
}

/// A generator on `device`, seeded for `stream`.
[[nodiscard]] inline at::Generator stream_generator(c10::Device device, std::int64_t seed, Stream stream,
                                                    std::int64_t index = 0) {
  at::Generator standard = at::globalContext().defaultGenerator(device);
  at::Generator generator = [&] {
    const std::scoped_lock lock(standard.mutex());
    return standard.clone();
  }();
  generator.set_current_seed(stream_seed(seed, stream, index));
  return generator;
}

}  // namespace cifar
