/// @file
/// The functor form of every penalty: a scalar tensor that carries a graph, for users who compose their own loss.
#pragma once

#include <microreg/version.hpp>

#include <microreg/penalty.hpp>

#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI {

namespace detail {

/// Checks that `probe` is a floating-point scalar with a graph; `penalty` is named in messages.
void check_probe(const at::Tensor& probe, std::string_view penalty);

/// The sum over probes of || d(probe)/d(parameters) ||^2; see squared_gradient_norm().
at::Tensor summed_squared_gradient_norms(const std::vector<at::Tensor>& probes,
                                         const std::vector<at::Tensor>& parameters, std::string_view penalty);

}  // namespace detail

/// || d(probe)/d(parameters) ||^2 as a scalar tensor that carries a graph, all parameters jointly.
///
/// Parameters that are frozen or that the probe does not reach count as zero. The result is float64 for float64
/// gradients, float32 otherwise, on the probe's device. Cost: one backward pass now, about two more passes when the
/// result is differentiated; the probe's graph is kept. Throws ModelError if the probe is no floating-point scalar with
/// a graph, or if no parameter requires a gradient. Differentiating the result a second time (create_graph) throws
/// where LibTorch's third derivative is wrong.
[[nodiscard]] inline at::Tensor squared_gradient_norm(const at::Tensor& probe,
                                                      const std::vector<at::Tensor>& parameters,
                                                      std::string_view penalty = "squared_gradient_norm") {
  return detail::summed_squared_gradient_norms({probe}, parameters, penalty);
}

/// A penalty of your own: the squared gradient norm of any probe. The probe is a callable that returns a scalar tensor
/// and takes the whole ForwardPass, or (output), or (output, target).
///
/// ```cpp
/// microreg::SquaredGradientNorm penalty{[](const torch::Tensor& output) { return output.logsumexp(1).mean(); }};
/// ```
template <class Probe>
struct SquaredGradientNorm {
  Probe function;                ///< returns s_M, a scalar with a graph
  std::string label = "custom";  ///< the name in reports and messages

  [[nodiscard]] const std::string& name() const noexcept { return label; }  ///< the label

  /// s_M = function(pass), or else function(output), or else function(output, target): the first that it takes.
  template <class Pass>
    requires detail::ProbeCallable<Probe, Pass>
  [[nodiscard]] at::Tensor probe(const Pass& pass) const {
    static_assert(std::is_convertible_v<decltype(detail::call_probe(function, pass)), at::Tensor>,
                  "microreg: the probe must return a scalar torch::Tensor that carries a graph");
    return detail::call_probe(function, pass);
  }

  /// The functor form, for a probe that takes (output): a scalar tensor with a graph. See squared_gradient_norm().
  [[nodiscard]] at::Tensor operator()(const at::Tensor& output, const std::vector<at::Tensor>& parameters) const
    requires std::is_invocable_r_v<at::Tensor, const Probe&, const at::Tensor&>
  {
    return squared_gradient_norm(function(output), parameters, label);
  }
};
template <class Probe>
SquaredGradientNorm(Probe) -> SquaredGradientNorm<Probe>;  ///< called "custom"
template <class Probe>
SquaredGradientNorm(Probe, std::string) -> SquaredGradientNorm<Probe>;  ///< called as you say

}  // namespace microreg::inline MICROREG_ABI

#if !defined(MICROREG_COMPILED)
#include <microreg/definitions/squared_gradient_norm.hpp>
#endif
