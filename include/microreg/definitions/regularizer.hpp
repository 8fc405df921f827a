/// @file
/// Definitions of regularizer.hpp: on tensors it is compiled once, as the step is.
#pragma once

#include <microreg/definitions/step.hpp>
#include <microreg/regularizer.hpp>

#if defined(MICROREG_COMPILED)
namespace microreg::inline MICROREG_ABI {
template class Regularizer<at::Tensor, at::Tensor>;
}  // namespace microreg::inline MICROREG_ABI
#endif
