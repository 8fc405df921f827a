/// @file
/// What operations take and return.
#pragma once

#include <ATen/core/Tensor.h>
#include <microreg/version.hpp>

#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

using Tensors = std::vector<at::Tensor>;

}  // namespace microreg::inline MICROREG_ABI::detail
