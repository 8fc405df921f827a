/// @file
/// Which parameters are trained and which of them count in a penalty.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/StringUtil.h>
#include <microreg/error.hpp>

#include <functional>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

namespace microreg {

/// A parameter and the name it goes by in messages and in a selection.
struct NamedParameter {
  std::string name;
  at::Tensor tensor;
};

/// Says whether a parameter's gradient counts in the squared norm of a penalty. Empty: all of them count.
///
/// ```cpp
/// options.select = [](const std::string&, const at::Tensor& p) { return p.dim() > 1; };  // no biases, no norms
/// ```
using ParameterSelection = std::function<bool(const std::string& name, const at::Tensor& parameter)>;

/// The parameters of one step. `tensors` are those that require a gradient, each once however often it is shared;
/// `selected` are the positions in `tensors` that count in the penalties.
struct Parameters {
  std::vector<std::string> names;
  std::vector<at::Tensor> tensors;
  std::vector<std::size_t> selected;
};

/// Drops frozen and repeated parameters and applies `selection`. Throws ModelError if nothing is left to train or to
/// penalise, or if a parameter is complex.
[[nodiscard]] inline Parameters trainable(const std::vector<NamedParameter>& all,
                                          const ParameterSelection& selection = {}) {
  Parameters result;
  std::unordered_set<const c10::TensorImpl*> seen;
  for (const auto& [name, tensor] : all) {
    if (!tensor.defined() || !tensor.requires_grad() || !seen.insert(tensor.unsafeGetTensorImpl()).second) {
      continue;
    }
    if (tensor.is_complex()) {
      throw ModelError(c10::str("parameter ", name, " is complex (", c10::toString(tensor.scalar_type()),
                                "); the penalties are defined for real parameters: freeze it, or keep its real and "
                                "imaginary parts as two parameters"));
    }
    if (!selection || selection(name, tensor)) {
      result.selected.push_back(result.tensors.size());
    }
    result.names.push_back(name);
    result.tensors.push_back(tensor);
  }
  if (result.tensors.empty()) {
    throw ModelError(c10::str("no parameter requires a gradient (", all.size(),
                              " given); unfreeze at least one with parameter.requires_grad_(true)"));
  }
  if (result.selected.empty()) {
    throw ModelError(
        c10::str("the option select chose none of the ", result.tensors.size(),
                 " parameters that require a gradient, so every penalty would be zero; the first is named ",
                 result.names.front()));
  }
  return result;
}

}  // namespace microreg
