/// @file
/// Unsquared: the gradient norm itself instead of its square.
#pragma once

#include <ATen/ATen.h>
#include <microreg/detail/text.hpp>
#include <microreg/penalty.hpp>
#include <microreg/version.hpp>

#include <concepts>
#include <optional>
#include <string>
#include <vector>

namespace microreg::inline MICROREG_ABI {

/// The norm where another penalty has its square,
///
///     R_M(w) = || g_M ||,   g_M = grad_w s_M   (all probes of the penalty jointly),
///
/// as in Zhao, Zhang, Hu, arXiv:2202.03599, for GradientNorm. Where g_M is zero, so is its derivative here; that of the
/// plain formula is NaN. The gradient is H g / ||g||, so it does not shrink as the norm does. Cost, options and draws
/// are those of the penalty inside.
///
/// ```cpp
/// microreg::Unsquared penalty{microreg::GradientNorm{}};
/// ```
template <Penalty P>
struct Unsquared {
  static constexpr bool squared = false;                                         ///< estimators take the norm itself
  static constexpr bool differentiates_input = detail::differentiates_input<P>;  ///< as the penalty inside

  P penalty;  ///< the one whose norm is taken

  /// "unsquared_" and the name of the penalty inside.
  [[nodiscard]] std::string name() const { return detail::text({"unsquared_", penalty.name()}); }

  /// Those of the penalty inside, a single probe as a list.
  template <class Pass>
    requires PenaltyFor<P, Pass>
  [[nodiscard]] auto probes(const Pass& pass) const {
    if constexpr (requires { penalty.probes(pass); }) {
      return penalty.probes(pass);
    } else {
      return std::vector<at::Tensor>{penalty.probe(pass)};
    }
  }

  /// The functor form: takes what the functor of the penalty inside takes.
  template <class First>
    requires std::invocable<const P&, const First&, const std::vector<at::Tensor>&>
  [[nodiscard]] at::Tensor operator()(const First& first, const std::vector<at::Tensor>& parameters) const {
    return root(penalty(first, parameters));
  }
  /// The same for a penalty that draws, from `generator`.
  template <class First>
    requires std::invocable<const P&, const First&, const std::vector<at::Tensor>&, const std::optional<at::Generator>&>
  [[nodiscard]] at::Tensor operator()(const First& first, const std::vector<at::Tensor>& parameters,
                                      const std::optional<at::Generator>& generator) const {
    return root(penalty(first, parameters, generator));
  }

 private:
  /// The square root with derivative 0 at 0: both the value and the derivative of the other branch are finite.
  static at::Tensor root(const at::Tensor& value) {
    const at::Tensor zero = value.detach() == 0;
    return at::where(zero, at::zeros_like(value), at::where(zero, at::ones_like(value), value).sqrt());
  }
};
template <class P>
Unsquared(P) -> Unsquared<P>;  ///< of the type of the penalty inside

}  // namespace microreg::inline MICROREG_ABI
