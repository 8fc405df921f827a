/// @file
/// Definitions of report.hpp.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <microreg/detail/config.hpp>
#include <microreg/detail/finite.hpp>
#include <microreg/detail/libtorch.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/report.hpp>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI {

namespace detail {

inline constexpr const char* remedy_of_non_finite =
    "lower the learning rate or the strength, check the input for NaN, or use float32 where half types overflow";

/// The position of the first value that is NaN or infinite, or -1, and the value.
inline std::pair<std::int64_t, double> first_non_finite(const at::Tensor& values) {
  const at::Tensor on_host = values.detach().to(at::kCPU, at::kDouble).contiguous();
  const double* data = values_of<double>(on_host);
  for (std::int64_t i = 0; i < on_host.numel(); ++i) {
    if (!is_finite(data[i])) {
      return {i, data[i]};
    }
  }
  return {-1, 0};
}

}  // namespace detail

MICROREG_INLINE at::Tensor Report::objective() const {
  at::Tensor sum = loss;
  for (const PenaltyReport& penalty : penalties) {
    sum = sum + penalty.value * penalty.strength;
  }
  return sum;
}

MICROREG_INLINE const PenaltyReport& Report::penalty(std::string_view name) const {
  std::string names;
  for (const PenaltyReport& candidate : penalties) {
    if (candidate.name == name) {
      return candidate;
    }
    names += (names.empty() ? "" : ", ") + candidate.name;
  }
  throw OptionError(detail::text({"the report has no penalty named ", name, "; it has: ", names}));
}

MICROREG_INLINE at::Tensor Report::output(std::size_t index, std::int64_t dimension) const {
  if (micro_batch_outputs.empty()) {
    throw OptionError("the report has no outputs; set .keep_outputs = true");
  }
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> tensors;
  for (const std::vector<at::Tensor>& outputs : micro_batch_outputs) {
    if (index >= outputs.size()) {
      throw OptionError(
          detail::text({"the report has no output ", index, "; the model returned ", outputs.size(), " tensors"}));
    }
    tensors.push_back(outputs[index]);
  }
  if (tensors.front().dim() == 0) {
    return at::stack(tensors);
  }
  const std::int64_t rank = tensors.front().dim();
  const std::int64_t d = dimension < 0 ? dimension + rank : dimension;
  if (d < 0 || d >= rank) {
    throw OptionError(detail::text({"output ", index, " has shape ", tensors.front().sizes(), " and no dimension ",
                                    dimension, "; give that of the samples: output(index, dimension)"}));
  }
  const auto others = [&](const at::Tensor& tensor) {
    std::vector<std::int64_t> sizes = tensor.sizes().vec();
    sizes.erase(sizes.begin() + d);
    return sizes;
  };
  for (const at::Tensor& tensor : tensors) {
    if (tensor.dim() != rank || others(tensor) != others(tensors.front())) {
      throw OptionError(
          detail::text({"output ", index, " has shape ", tensors.front().sizes(), " in the first micro-batch and ",
                        tensor.sizes(), " in another, which do not fit together along dimension ", dimension,
                        "; give that of the samples: output(index, dimension)"}));
    }
  }
  return at::cat(tensors, d);
}

MICROREG_INLINE void Report::throw_if_not_finite() const {
  const auto check = [&](const at::Tensor& values, const std::string& what, const std::vector<std::int64_t>& of) {
    const auto [position, value] = detail::first_non_finite(values);
    if (position >= 0) {
      const std::int64_t micro_batch =
          first_micro_batch + (of.empty() ? position : of[static_cast<std::size_t>(position)]);
      throw NonFiniteError(detail::text({what, " is ", value, " in micro-batch ", micro_batch,
                                         first_micro_batch == 0 ? detail::text({" of ", micro_batches()}) : "",
                                         " at step ", step, "; ", detail::remedy_of_non_finite}),
                           micro_batch);
    }
  };
  check(micro_batch_losses, "the loss", {});
  for (const PenaltyReport& penalty : penalties) {
    check(penalty.micro_batch_norms, detail::text({"the gradient norm of penalty ", penalty.name}), penalised);
  }
  if (!gradient_norm.defined()) {
    return;
  }
  if (const auto [position, value] = detail::first_non_finite(gradient_norm); position >= 0) {
    throw NonFiniteError(detail::text({"the gradient of the objective is ", value, " at step ", step,
                                       " although every loss and penalty is finite; ", detail::remedy_of_non_finite}),
                         first_micro_batch);
  }
}

}  // namespace microreg::inline MICROREG_ABI
