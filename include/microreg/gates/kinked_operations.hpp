/// @file
/// Which operations have gates for their kinks.
#pragma once

#include <microreg/gates/activations.hpp>
#include <microreg/gates/arithmetic.hpp>
#include <microreg/gates/clamp.hpp>
#include <microreg/gates/extrema.hpp>
#include <microreg/gates/kinked_operation.hpp>
#include <microreg/gates/logit.hpp>
#include <microreg/gates/losses.hpp>
#include <microreg/gates/pooling.hpp>
#include <microreg/gates/signs.hpp>

#include <span>

namespace microreg::inline MICROREG_ABI::detail::gating {

/// All but rrelu, which draws too (draws.hpp).
inline constexpr std::span<const KinkedOperation> kinked_operations[] = {activations, clamps, logits,   signs,
                                                                         extrema,     losses, poolings, arithmetic};

}  // namespace microreg::inline MICROREG_ABI::detail::gating
