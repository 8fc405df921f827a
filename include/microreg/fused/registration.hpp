/// @file
/// Puts the fused kernels on the key that the scope includes.
#pragma once

#include <microreg/detail/config.hpp>
#include <microreg/detail/interceptors.hpp>
#include <microreg/fused/rule.hpp>
#include <microreg/fused/rules.hpp>

#include <memory>
#include <string>

namespace microreg::inline MICROREG_ABI::detail {

/// Registers the rules, once per process: another shared object that includes this header finds them there.
class FusedRegistration {
 public:
  FusedRegistration() {
    const Registering registering;
    for (const Rule* rule : fused_rules) {
      const auto fits = [&](const c10::FunctionSchema& found) { return c10::toString(found) == rule->schema; };
      const std::string operation = operation_of(*rule);
      Interceptors::report(operation, kernels_.add(operation, fits, std::make_unique<RuleKernel>(*rule)));
    }
  }

 private:
  Interceptors kernels_;
};

MICROREG_INLINE void register_fused_kernels() { static const FusedRegistration registration; }

}  // namespace microreg::inline MICROREG_ABI::detail
