/// @file
/// A checksum that tells a damaged file, or a run that went another way.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <string_view>
#include <vector>

namespace cifar {

/// The 64-bit FNV-1a hash of `bytes`, going on from `hash`.
[[nodiscard]] constexpr std::uint64_t fnv1a(std::string_view bytes, std::uint64_t hash = 0xcbf29ce484222325U) noexcept {
  for (const char byte : bytes) {
    hash = (hash ^ static_cast<unsigned char>(byte)) * 0x100000001b3U;
  }
  return hash;
}

/// The hash of the values of `tensors`, bit by bit, one after the other.
[[nodiscard]] inline std::uint64_t fnv1a(const std::vector<torch::Tensor>& tensors) {
  std::uint64_t hash = fnv1a(std::string_view());
  for (const torch::Tensor& tensor : tensors) {
    const torch::Tensor values = tensor.detach().to(torch::kCPU).contiguous();
    hash = fnv1a({static_cast<const char*>(values.const_data_ptr()), values.nbytes()}, hash);
  }
  return hash;
}

}  // namespace cifar
