/// @file
/// What a step needs of the batch, the options and the parameters before it begins.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/options.hpp>
#include <microreg/parameters.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/tensor_lists.hpp>

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// The device that all of `tensors` share, if they do.
inline std::optional<c10::Device> common_device(const std::vector<at::Tensor>& tensors) {
  const c10::Device device = tensors.front().device();
  const bool same =
      std::all_of(tensors.begin(), tensors.end(), [&](const at::Tensor& tensor) { return tensor.device() == device; });
  return same ? std::optional(device) : std::nullopt;
}

/// Throws BatchError for a tensor, OptionError for a generator, on another device than the model.
inline void check_devices(const MiniBatch& batch, const RegularizerOptions& options,
                          const std::vector<at::Tensor>& parameters) {
  const auto device = common_device(parameters);
  if (!device.has_value()) {
    return;  // A model spread over devices knows where its inputs go.
  }
  batch.for_each_tensor([&](const at::Tensor& tensor, const std::string& path) {
    if (tensor.defined() && tensor.device() != *device) {
      throw BatchError(
          text({path, " is on ", tensor.device(), ", the model on ", *device, "; move it with .to(", *device, ")"}));
    }
  });
  if (options.generator.has_value() && options.generator->device().type() != device->type()) {
    throw OptionError(text({"generator is on ", options.generator->device(), ", the model on ", *device,
                            "; make the generator on the model's device"}));
  }
}

/// Throws ModelError for a parameter that cannot be trained, or a `.grad` that cannot be added to.
inline void check_parameters(const Parameters& parameters) {
  for (std::size_t i = 0; i < parameters.tensors.size(); ++i) {
    const at::Tensor& parameter = parameters.tensors[i];
    if (!parameter.is_leaf()) {
      throw ModelError(text({"parameter ", parameters.names[i],
                             " is no leaf but computed from other tensors, so it would get no .grad; compute it "
                             "inside the model, and pass what it is computed from"}));
    }
    const char* const problem = problem_of_grad(parameter);
    if (problem != nullptr) {
      throw ModelError(text({".grad of parameter ", parameters.names[i], " is ", problem,
                             ", so nothing can be added to it; clear it with zero_grad(), or clone() it"}));
    }
  }
}

/// Throws where the input was computed with a graph, which the further passes of a difference would not repeat.
inline void require_plain_input(const MiniBatch& batch) {
  batch.for_each_tensor([](const at::Tensor& tensor, const std::string& path) {
    if (tensor.defined() && tensor.grad_fn() != nullptr) {
      throw ModelError(text({path,
                             " carries a graph, which the further passes of a difference do not repeat; detach() it, "
                             "compute it inside the model, or use Exact"}));
    }
  });
}

}  // namespace microreg::inline MICROREG_ABI::detail
