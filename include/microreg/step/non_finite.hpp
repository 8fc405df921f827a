/// @file
/// NaN and infinity in a report, and what the options say is to be done.
#pragma once

#include <ATen/ATen.h>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/options.hpp>
#include <microreg/report.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/ranks.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// Throws NonFiniteError, which names a cause that plain training does not meet: all labels of a micro-batch ignored.
inline void require_finite(const Report& report, const MiniBatch& batch, const std::vector<Part>& parts) {
  try {
    report.throw_if_not_finite();
  } catch (const NonFiniteError& error) {
    if (parts.empty()) {
      throw;
    }
    const Part& part = parts[static_cast<std::size_t>(error.micro_batch() - parts.front().index)];
    std::string cause;
    batch.for_each_tensor([&](const at::Tensor& tensor, const std::string& path) {
      if (path.starts_with("target") && tensor.defined() && tensor.layout() == at::kStrided && tensor.dim() > 0 &&
          at::isIntegralType(tensor.scalar_type(), /*includeBool=*/false) && part.begin + part.size <= tensor.size(0)) {
        const at::Tensor labels = tensor.narrow(0, part.begin, part.size);
        if (labels.numel() > 0 && (labels == labels.flatten()[0]).all().item<bool>()) {
          cause = text({"; all labels of the micro-batch in ", path, " are ", labels.flatten()[0].item<std::int64_t>(),
                        ": if that is the ignore_index, the mean is over none, so shuffle, choose a larger "
                        "micro_batch_size, or return (loss_sum / count.clamp_min(1)) from the loss"});
        }
      }
    });
    throw NonFiniteError(error.what() + cause, error.micro_batch());
  }
}

/// Whether the options ask to look for NaN and infinity in a step of this report.
inline bool looks_for_non_finite(const Report& report, const RegularizerOptions& options) {
  return options.non_finite != NonFinite::error || may_look(options.check_finite, report.loss.is_cpu());
}

/// Looks for NaN and infinity in the report as the options ask. Whether the step is to be skipped; throws
/// NonFiniteError otherwise.
inline Fared check_finite(const Report& report, const MiniBatch& batch, const RegularizerOptions& options,
                          const std::vector<Part>& parts) {
  if (options.non_finite == NonFinite::skip_step) {
    try {
      report.throw_if_not_finite();
    } catch (const NonFiniteError&) {
      return Fared::to_be_skipped;
    }
  } else if (looks_for_non_finite(report, options)) {
    require_finite(report, batch, parts);
  }
  return Fared::well;
}

/// The same on one of several ranks, before its sums meet the others'. Under a loss scale that follows the gradients an
/// infinite penalty is no error, but `overflowed`.
inline Fared check_own(const Report& report, const MiniBatch& batch, const RegularizerOptions& options,
                       const std::vector<Part>& parts, bool& overflowed) {
  if (!options.loss_scale.dynamic.has_value()) {
    return check_finite(report, batch, options, parts);
  }
  overflowed = !std::all_of(report.penalties.begin(), report.penalties.end(),
                            [](const PenaltyReport& penalty) { return penalty.value.isfinite().item<bool>(); });
  return report.loss.isfinite().item<bool>() ? Fared::well : check_finite(report, batch, options, parts);
}

}  // namespace microreg::inline MICROREG_ABI::detail
