/// @file
/// How far a difference displaces what, and where that cannot be.
#pragma once

#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <microreg/check_finite.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/parameters.hpp>
#include <microreg/step/difference_passes.hpp>
#include <microreg/step/displacement.hpp>
#include <microreg/step/mini_batch.hpp>
#include <microreg/step/tensor_lists.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <optional>
#include <string>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// The automatic step, as a multiple of the norm of what is displaced: where the error of the difference (which grows
/// with the step, or its square) and rounding (which grows with its inverse) meet on random ReLU networks
/// (benchmarks/step_study.cpp).
inline double relative_step(const std::vector<at::Tensor>& displaced, bool central) {
  const bool fine = std::all_of(displaced.begin(), displaced.end(),
                                [](const at::Tensor& tensor) { return tensor.scalar_type() == at::kDouble; });
  if (fine) {
    return central ? 1e-6 : 1e-8;
  }
  return central ? 5e-4 : 5e-5;
}

/// The largest automatic step in float32: on wide networks, whose parameters have a large norm, the error of the
/// difference goes with the displacement itself (measured on ResNet-18 and VGG-11).
inline double largest_step(bool central) { return central ? 2e-3 : 4e-4; }

/// The displacements of one step.
class Displacements {
 public:
  Displacements(const DifferenceSettings& settings, const Parameters& parameters, const Proof& proof, CheckFinite looks)
      : settings_(settings), parameters_(parameters), proof_(proof), looks_(looks) {}

  /// Computes what micro-batches share, before several of them ask for it side by side.
  void prepare(const MiniBatch& batch, const Weights& weights) {
    for (std::size_t i = 0; settings_.step == 0 && i < batch.terms(); ++i) {
      if (weights.strengths[i] > 0 && !batch.term(i).by_input) {
        (void)parameter_length();
      }
    }
  }

  /// The norm of the displacement, a scalar on the device.
  at::Tensor length(const TermInfo& term, const std::vector<at::Tensor>& inputs, const DifferenceProbe& probe) {
    if (settings_.step > 0) {
      return at::full_like(probe.squared_norm, settings_.step);
    }
    const at::TensorOptions scalar = probe.squared_norm.options();
    if (term.by_input) {
      check_precision("input", inputs);
      return automatic_length(inputs, squared_norm(inputs, scalar)) * proof_.factor;
    }
    return parameter_length().to(scalar) * proof_.factor;
  }

  /// The norm of the parameters that are displaced, or 0 where it may not be read.
  double moved_norm() {
    return may_look(looks_, squared_parameter_norm().is_cpu()) ? std::sqrt(squared_parameter_norm().item<double>())
                                                               : 0.0;
  }

  /// The selected parameters.
  Displaceable& parameters() {
    if (!displaceable_.has_value()) {
      require_separate_memory();
      displaceable_.emplace(selected(parameters_.tensors, parameters_));
    }
    return *displaceable_;
  }

  /// All parameters, with displaced copies in place of the selected ones.
  [[nodiscard]] std::vector<at::Tensor> copies(const std::vector<at::Tensor>& directions,
                                               const at::Tensor& distance) const {
    std::vector<at::Tensor> result = parameters_.tensors;
    const std::vector<at::Tensor> there = moved(selected(result, parameters_), directions, distance);
    for (std::size_t i = 0; i < there.size(); ++i) {
      result[parameters_.selected[i]] = there[i];
    }
    return result;
  }

  /// Leaves at tensors[i] + distance * directions[i].
  static std::vector<at::Tensor> moved(const std::vector<at::Tensor>& tensors,
                                       const std::vector<at::Tensor>& directions, const at::Tensor& distance) {
    std::vector<at::Tensor> result;
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const at::Tensor plain = tensors[i].detach();
      const at::Tensor factor = distance.to(plain.device(), plain.scalar_type());
      result.push_back(directions[i].defined() ? at::addcmul(plain, directions[i], factor) : plain);
      result.back().requires_grad_(true);
    }
    return result;
  }

 private:
  /// Of the parameters that are displaced.
  const at::Tensor& squared_parameter_norm() {
    if (!squared_parameter_norm_.defined()) {
      const std::vector<at::Tensor> moved = selected(parameters_.tensors, parameters_);
      squared_parameter_norm_ = squared_norm(moved, moved.front().options());
    }
    return squared_parameter_norm_;
  }

  /// Of the parameters' automatic displacement.
  const at::Tensor& parameter_length() {
    if (!parameter_length_.defined()) {
      const std::vector<at::Tensor> moved = selected(parameters_.tensors, parameters_);
      check_precision("parameters", moved);
      parameter_length_ = automatic_length(moved, squared_parameter_norm()).clamp_max(largest_step(settings_.central));
    }
    return parameter_length_;
  }

  at::Tensor automatic_length(const std::vector<at::Tensor>& moved, const at::Tensor& squared) const {
    // What is all zero has no scale: displace by the step itself then.
    return at::where(squared == 0, at::ones_like(squared), squared.sqrt()) * relative_step(moved, settings_.central);
  }

  /// Two parameters on the same memory cannot be moved each by its own gradient, nor two elements of one.
  void require_separate_memory() const {
    for (const std::size_t i : parameters_.selected) {
      if (at::has_internal_overlap(parameters_.tensors[i]) == at::MemOverlap::Yes) {
        throw ModelError(
            text({"parameter ", parameters_.names[i], " of shape ", parameters_.tensors[i].sizes(),
                  " is expanded, several elements in one place, which a difference cannot move each by "
                  "its own gradient; clone() it before requires_grad_(), set .displace = Displace::copies, or use "
                  "Exact"}));
      }
      for (std::size_t j = 0; j < parameters_.tensors.size(); ++j) {
        const auto overlap =
            i == j ? at::MemOverlapStatus::No : at::get_overlap_status(parameters_.tensors[i], parameters_.tensors[j]);
        if (overlap == at::MemOverlapStatus::Full || overlap == at::MemOverlapStatus::Partial) {
          throw ModelError(text({"parameters ", parameters_.names[i], " and ", parameters_.names[j],
                                 " share memory, and a difference cannot move one alone; register one tensor in both "
                                 "places, set .displace = Displace::copies, or use Exact"}));
        }
      }
    }
  }

  /// A displacement a ten-thousandth of the parameters vanishes in half types.
  static void check_precision(const char* what, const std::vector<at::Tensor>& tensors) {
    for (const at::Tensor& parameter : tensors) {
      if (parameter.scalar_type() != at::kFloat && parameter.scalar_type() != at::kDouble) {
        throw OptionError(text({"estimator.step is 0 (automatic) for ", what, " in ", parameter.scalar_type(),
                                ", too coarse a type for small displacements; keep the ", what,
                                " in float32, choose a step by experiment, or use Exact"}));
      }
    }
  }

  DifferenceSettings settings_;
  const Parameters& parameters_;
  const Proof& proof_;
  CheckFinite looks_;
  std::optional<Displaceable> displaceable_;  // made when first needed, as is
  at::Tensor squared_parameter_norm_;         // likewise
  at::Tensor parameter_length_;               // likewise
};

}  // namespace microreg::inline MICROREG_ABI::detail
