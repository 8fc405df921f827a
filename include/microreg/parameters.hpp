/// @file
/// Which parameters are trained and which of them count in a penalty.
#pragma once

#include <ATen/core/Tensor.h>
#include <microreg/version.hpp>

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

namespace microreg::inline MICROREG_ABI {

/// A parameter and the name it goes by in messages and in a selection.
struct NamedParameter {
  std::string name;   ///< "features.0.weight" of a module, "parameters[0]" of a list
  at::Tensor tensor;  ///< the parameter itself, no copy; frozen ones too
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
  std::vector<std::string> names;     ///< names[i] is that of tensors[i]
  std::vector<at::Tensor> tensors;    ///< the parameters themselves; at least one
  std::vector<std::size_t> selected;  ///< ascending; at least one
};

/// Drops frozen and repeated parameters and applies `selection`. Throws ModelError if nothing is left to train or to
/// penalise, or if a parameter is complex.
[[nodiscard]] Parameters trainable(const std::vector<NamedParameter>& all, const ParameterSelection& selection = {});

}  // namespace microreg::inline MICROREG_ABI

#if !defined(MICROREG_COMPILED)
#include <microreg/definitions/parameters.hpp>
#endif
