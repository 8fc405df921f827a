/// @file
/// FusedScope: exact double backward at the cost that arithmetic asks for.
#pragma once

#include <microreg/detail/interception.hpp>

#include <cstdlib>
#include <string_view>

#if defined(MICROREG_COMPILED)
namespace microreg::inline MICROREG_ABI::detail {
void register_fused_kernels();
}  // namespace microreg::inline MICROREG_ABI::detail
#else
#include <microreg/fused/registration.hpp>
#endif

namespace microreg::inline MICROREG_ABI {

/// While it lives, backward passes with create_graph on this thread are recorded so that differentiating them again is
/// fast and exact. Throws Error where another version of microreg has intercepted LibTorch's operations in this
/// process.
class FusedScope {
 public:
  /// A scope that is not `wanted` does nothing, as all do where MICROREG_FUSED turns them off.
  explicit FusedScope(bool wanted = true) : interception_(wanted && enabled() && registered()) {}
  FusedScope(const FusedScope&) = delete;
  FusedScope& operator=(const FusedScope&) = delete;
  ~FusedScope() = default;

  /// Whether the environment of the process lets scopes work: all but MICROREG_FUSED=0 and MICROREG_FUSED=off do.
  [[nodiscard]] static bool enabled() {
    static const bool allowed = [] {
      const char* value = std::getenv("MICROREG_FUSED");
      return value == nullptr || (std::string_view(value) != "0" && std::string_view(value) != "off");
    }();
    return allowed;
  }

 private:
  static bool registered() {
    detail::register_fused_kernels();
    return true;
  }

  detail::Interception interception_;
};

}  // namespace microreg::inline MICROREG_ABI
