/// @file
/// Which operations FusedScope intercepts.
#pragma once

#include <microreg/version.hpp>

#include <optional>
#include <set>
#include <string>
#include <utility>

namespace microreg::inline MICROREG_ABI::detail {

/// The chosen ones, named without "aten::"; nothing: all.
inline std::optional<std::set<std::string>>& fused_operations() {
  static std::optional<std::set<std::string>> chosen;
  return chosen;
}

/// To measure what each is worth: intercepts these alone. To be called before the first scope of the process.
inline void limit_fused_operations(std::set<std::string> operations) { fused_operations() = std::move(operations); }

}  // namespace microreg::inline MICROREG_ABI::detail
