/// @file
/// Whether a further pass of a difference repeats the first: its probes must be near.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <microreg/check_finite.hpp>
#include <microreg/detail/finite.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/error.hpp>
#include <microreg/parameters.hpp>
#include <microreg/step/difference_passes.hpp>
#include <microreg/step/tensor_lists.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// For all micro-batches of one step.
class ProbeWatch {
 public:
  ProbeWatch(const Parameters& parameters, CheckFinite looks) : parameters_(parameters), looks_(looks) {}

  static void require_as_many(const TermInfo& info, const DifferenceTerm& term, const std::vector<at::Tensor>& probes) {
    if (probes.size() != term.probes.size()) {
      throw ModelError(text({info.name, ": there were ", term.probes.size(), " probes in the first pass and ",
                             probes.size(), " in a further one; return as many in every pass"}));
    }
  }

  /// Throws where a probe at the first point is not what it was. `moved`: how far the displacement moves it.
  static void require_repeated(const std::string& name, const DifferenceProbe& first, const at::Tensor& again,
                               double moved) {
    const double was = first.value.item<double>();
    const double is = again.item<double>();
    const double rounding = 4096 * epsilon_of(again.scalar_type()) * std::max(std::abs(was), std::abs(is));
    if (std::abs(is - was) > rounding + std::abs(moved)) {
      throw_not_shared(name, text({"at the same parameters ", is, " instead of ", was}));
    }
  }

  /// Whether a probe that was displaced by `distance` times its gradient has changed by the mean of what its gradients
  /// at both ends say, to half of that change and rounding: the rest goes with the third power of the displacement.
  [[nodiscard]] bool is_near(const DifferenceProbe& probe, const at::Tensor& value,
                             const std::vector<at::Tensor>& gradient, bool by_input, const at::Tensor& distance) {
    if (!may_look(looks_, value.is_cpu())) {
      return true;
    }
    const at::NoGradGuard no_grad;
    const auto slope_there = [&] {
      at::Tensor sum = at::zeros_like(probe.squared_norm);
      for (std::size_t i = 0; i < probe.direction.size(); ++i) {
        const at::Tensor& there = gradient[parameters_.selected[i]];
        if (probe.direction[i].defined() && there.defined()) {
          sum = sum + (probe.direction[i] * there).sum(sum.scalar_type()).to(sum.device());
        }
      }
      return sum;
    };
    const double epsilon = epsilon_of(value.scalar_type());
    const double before = probe.value.item<double>();
    const double change = value.item<double>() - before;
    const double rounding = 64 * epsilon * std::max(std::abs(before), std::abs(before + change));
    const double first_order = (distance * probe.squared_norm).item<double>();
    // What is not finite is not near or far, and has an error of its own.
    const double off = std::abs(change - first_order);
    if (!is_finite(off) || off <= std::abs(first_order) / 2 + rounding) {
      return true;
    }
    const double other_end = by_input ? first_order : (distance * slope_there()).item<double>();
    const double off_mean = std::abs(change - (first_order + other_end) / 2);
    return !is_finite(off_mean) || off_mean <= (std::abs(first_order) + std::abs(other_end)) / 2 + rounding;
  }

  /// Whether a central difference, from the gradient `back` to `there` with `here` in the middle, is one of a nearly
  /// straight line. Its halves, there - here and here - back, differ by what is lost in rounding and by the curvature
  /// that it neglects: by a tenth of their sum at most, or by the rounding of gradients.
  [[nodiscard]] bool is_straight(const std::vector<at::Tensor>& back, const std::vector<at::Tensor>& here,
                                 const std::vector<at::Tensor>& there) const {
    double bend = 0, change = 0, norm = 0;
    const at::NoGradGuard no_grad;
    const auto add = [](double& sum, const at::Tensor& tensor) { sum = std::hypot(sum, norm_of({tensor})); };
    double epsilon = 0;
    for (std::size_t i = 0; i < here.size(); ++i) {
      if (!there[i].defined() && !back[i].defined()) {
        continue;
      }
      const at::Tensor middle = here[i].defined() ? here[i] : at::zeros_like(there[i].defined() ? there[i] : back[i]);
      if (!may_look(looks_, middle.is_cpu())) {
        return true;
      }
      const at::Tensor after = there[i].defined() ? there[i] - middle : -middle;
      const at::Tensor before = back[i].defined() ? middle - back[i] : middle;
      add(bend, after - before);
      add(change, after + before);
      add(norm, middle);
      epsilon = std::max(epsilon, epsilon_of(middle.scalar_type()));
    }
    return !is_finite(bend + change) || bend <= change / 10 || bend <= 4 * epsilon * norm;
  }

 private:
  [[noreturn]] static void throw_not_shared(const std::string& what, const std::string& by) {
    throw DifferenceError(text(
        {what, ": a further pass of a difference does not repeat the first (", by,
         "): noise that is not drawn on this thread by LibTorch, state outside of the model's buffers that a pass "
         "changes, a buffer that is replaced instead of written to, or a tensor that is changed in place. Make it a "
         "buffer, draw with LibTorch's functions, or use Exact"}));
  }

  const Parameters& parameters_;
  CheckFinite looks_;
};

}  // namespace microreg::inline MICROREG_ABI::detail
