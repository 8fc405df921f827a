/// @file
/// Definitions of parameters.hpp.
#pragma once

#include <microreg/detail/config.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/parameters.hpp>

#include <unordered_set>

namespace microreg::inline MICROREG_ABI {

MICROREG_INLINE Parameters trainable(const std::vector<NamedParameter>& all, const ParameterSelection& selection) {
  Parameters result;
  std::unordered_set<const c10::TensorImpl*> seen;
  for (const auto& [name, tensor] : all) {
    if (!tensor.defined() || !tensor.requires_grad() || !seen.insert(tensor.unsafeGetTensorImpl()).second) {
      continue;
    }
    if (tensor.is_complex()) {
      throw ModelError(
          detail::text({"parameter ", name, " is complex (", c10::toString(tensor.scalar_type()),
                        "); the penalties are defined for real parameters: freeze it, or keep its real and "
                        "imaginary parts as two parameters"}));
    }
    if (!selection || selection(name, tensor)) {
      result.selected.push_back(result.tensors.size());
    }
    result.names.push_back(name);
    result.tensors.push_back(tensor);
  }
  if (result.tensors.empty()) {
    throw ModelError(
        detail::text({"no parameter requires a gradient (", all.size(),
                      all.empty() ? " given); submodules and parameters count where the constructor hands them to "
                                    "register_module() and register_parameter()"
                                  : " given); unfreeze at least one with "
                                    "parameter.requires_grad_(true)"}));
  }
  if (result.selected.empty()) {
    throw ModelError(
        detail::text({"the option select chose none of the ", result.tensors.size(),
                      " parameters that require a gradient, so every penalty would be zero; the first is named ",
                      result.names.front()}));
  }
  return result;
}

}  // namespace microreg::inline MICROREG_ABI
