/// @file
/// What a forward pass must not write to if it is to be repeated: its batch and the parameters.
#pragma once

#include <ATen/core/Tensor.h>
#include <microreg/detail/text.hpp>
#include <microreg/detail/version_of.hpp>
#include <microreg/error.hpp>
#include <microreg/gates/constants.hpp>
#include <microreg/parameters.hpp>
#include <microreg/step/mini_batch.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// The versions of batch and parameters, which LibTorch counts up at every write in place.
class Untouched {
 public:
  Untouched(const MiniBatch& batch, const Parameters& parameters)
      : batch_(batch),
        parameters_(parameters),
        of_batch_(versions_of(batch)),
        of_parameters_(versions_of(parameters)) {}

  /// Throws DifferenceError that names what was written to since, but for projections that a further pass does not
  /// repeat.
  void require(const GateTape& tape) const {
    std::size_t i = 0;
    batch_.for_each_tensor([&](const at::Tensor& tensor, const std::string& path) {
      if (i < of_batch_.size() && version_of(tensor) != of_batch_[i]) {
        throw DifferenceError(text({path, " of shape ", tensor.sizes(),
                                    " was changed in place by the model or the loss, so that a further pass of a "
                                    "difference would see another batch; use the operation out of place (or clone() "
                                    "first), or Exact"}));
      }
      ++i;
    });
    const std::vector<std::uint64_t> now = versions_of(parameters_);
    for (std::size_t p = 0; p < now.size(); ++p) {
      if (now[p] != of_parameters_[p] + projections_of(parameters_.tensors[p], tape)) {
        throw DifferenceError(text({"parameter ", parameters_.names[p], " of shape ", parameters_.tensors[p].sizes(),
                                    " was written to in the forward pass (a projection), which undoes the "
                                    "displacement of a difference; project after the optimizer's step, or use Exact"}));
      }
    }
  }

 private:
  static std::vector<std::uint64_t> versions_of(const MiniBatch& batch) {
    std::vector<std::uint64_t> result;
    batch.for_each_tensor(
        [&](const at::Tensor& tensor, const std::string& /*path*/) { result.push_back(version_of(tensor)); });
    return result;
  }
  static std::vector<std::uint64_t> versions_of(const Parameters& parameters) {
    std::vector<std::uint64_t> result;
    for (const at::Tensor& parameter : parameters.tensors) {
      result.push_back(version_of(parameter));
    }
    return result;
  }

  const MiniBatch& batch_;
  const Parameters& parameters_;
  std::vector<std::uint64_t> of_batch_;
  std::vector<std::uint64_t> of_parameters_;
};

}  // namespace microreg::inline MICROREG_ABI::detail
