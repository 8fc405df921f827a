/// @file
/// What LibTorch counts at every write in place.
#pragma once

#include <ATen/core/Tensor.h>
#include <microreg/version.hpp>

#include <cstdint>

namespace microreg::inline MICROREG_ABI::detail {

/// How often a tensor's memory has been written to; 0 where nobody counts (undefined, inference mode).
inline std::uint64_t version_of(const at::Tensor& tensor) {
  return !tensor.defined() || tensor.is_inference() ? 0 : static_cast<std::uint64_t>(tensor._version());
}

}  // namespace microreg::inline MICROREG_ABI::detail
