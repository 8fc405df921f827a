/// @file
/// The one concept behind every penalty: the squared parameter-gradient norm of a scalar, the probe,
///
///     R_M(w) = || grad_w s_M(w) ||^2,
///
/// on a micro-batch M (arXiv:2211.15853, section 3). A penalty names its probe; the estimators differentiate it.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <microreg/strength.hpp>
#include <microreg/version.hpp>

#include <concepts>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI {

/// What the probes of one penalty drew at random in the first pass over a micro-batch, in order. An estimator that
/// needs further passes hands it out again there: a label must not flip because the logits have moved.
class Draws {
 public:
  /// The next draw. In a further pass `sample` is called too, whose own draws are those of the first.
  template <class Sample>
  [[nodiscard]] at::Tensor next(const Sample& sample) {
    return keep(sample());
  }

  /// From here on `next` returns what was recorded, from the beginning.
  void replay() noexcept {
    position_ = 0;
    replaying_ = true;
  }

 private:
  /// Records `fresh`, or gives what stands in its place. Throws ModelError past the end.
  at::Tensor keep(const at::Tensor& fresh);

  std::vector<at::Tensor> recorded_;
  std::size_t position_ = 0;
  bool replaying_ = false;
};

/// What a probe may read: one micro-batch after its forward pass. Output is what the model returned, loss the
/// micro-batch's mean loss, a scalar with a graph. `generator` is the one to draw from, if the user named one.
template <class Input, class Output, class Target>
struct ForwardPass {
  const Input& input;                             ///< what the model was called with
  const Output& output;                           ///< what it returned, with its graph
  const Target& target;                           ///< the true labels; undefined in a Penalised
  const at::Tensor& loss;                         ///< L_M, with its graph
  const std::optional<at::Generator>& generator;  ///< empty: the default one of the output's device
  Draws* draws = nullptr;                         ///< what draw() keeps and gives again; null: every draw is a new one

  /// What `sample()` returns, the same in every pass that an estimator makes over this micro-batch. For labels and
  /// directions that depend on the output; `sample` should draw from `generator` and without a graph.
  template <class Sample>
  [[nodiscard]] at::Tensor draw(const Sample& sample) const {
    return draws == nullptr ? at::Tensor(sample()) : draws->next(sample);
  }
};

/// Checks that `output` is a floating-point tensor [M, ...], and returns it; throws ModelError otherwise.
/// `penalty` is named in messages.
[[nodiscard]] const at::Tensor& differentiable_output(const at::Tensor& output, std::string_view penalty);

namespace detail {

template <class Pass>
concept HasTensorOutput = std::convertible_to<decltype(std::declval<const Pass&>().output), const at::Tensor&>;

/// Calls a user's probe with what it takes: the whole ForwardPass, (output), or (output, target).
template <class Function, class Pass>
decltype(auto) call_probe(const Function& function, const Pass& pass) {
  if constexpr (std::is_invocable_v<const Function&, const Pass&>) {
    return function(pass);
  } else if constexpr (std::is_invocable_v<const Function&, decltype(pass.output)>) {
    return function(pass.output);
  } else {
    return function(pass.output, pass.target);
  }
}

template <class Function, class Pass>
concept ProbeCallable = std::is_invocable_v<const Function&, const Pass&> ||
                        std::is_invocable_v<const Function&, decltype(std::declval<const Pass&>().output)> ||
                        std::is_invocable_v<const Function&, decltype(std::declval<const Pass&>().output),
                                            decltype(std::declval<const Pass&>().target)>;

}  // namespace detail

/// A penalty: it has a name, and `probe(pass)` returns a scalar tensor with a graph, or `probes(pass)` a vector of
/// them, whose squared gradient norms are added up. (The members are templates over the pass; PenaltyFor checks them.)
template <class P>
concept Penalty = std::copy_constructible<P> && !std::is_base_of_v<at::Tensor, P> && requires(const P& penalty) {
  { penalty.name() } -> std::convertible_to<std::string_view>;
};

/// A penalty whose probe can be evaluated on `Pass`.
template <class P, class Pass>
concept PenaltyFor = Penalty<P> && (requires(const P& penalty, const Pass& pass) {
                       { penalty.probe(pass) } -> std::convertible_to<at::Tensor>;
                     } || requires(const P& penalty, const Pass& pass) {
                       { penalty.probes(pass) } -> std::convertible_to<std::vector<at::Tensor>>;
                     });

namespace detail {

/// A penalty may declare `static constexpr bool differentiates_input = true`: its probes are then differentiated with
/// respect to the floating-point tensors of the input instead of the parameters.
template <class P>
inline constexpr bool differentiates_input = [] {
  if constexpr (requires { P::differentiates_input; }) {
    return static_cast<bool>(P::differentiates_input);
  } else {
    return false;
  }
}();

/// A penalty may declare `static constexpr bool squared = false`: it is then the norm itself.
template <class P>
inline constexpr bool is_squared = [] {
  if constexpr (requires { P::squared; }) {
    return static_cast<bool>(P::squared);
  } else {
    return true;
  }
}();

}  // namespace detail

/// A penalty with its own strength.
template <Penalty P>
struct Weighted {
  Strength strength;  ///< multiplied by that of the options
  P penalty;          ///< R_M, without the strength
};

/// Several penalties at once, each with its own strength: `0.01 * GradientNorm{} + 1e-3 * UnitJacobian{}`.
template <Penalty... P>
struct PenaltySum {
  std::tuple<Weighted<P>...> terms;  ///< in the order of Report::penalties
};

template <class Input, class Output, class Target>
class AnyPenalty;

namespace detail {

template <Penalty P>
PenaltySum<P> as_sum(P penalty) {
  return {{Weighted<P>{1.0, std::move(penalty)}}};
}
template <Penalty P>
PenaltySum<P> as_sum(Weighted<P> term) {
  return {{std::move(term)}};
}
template <Penalty... P>
PenaltySum<P...> as_sum(PenaltySum<P...> sum) {
  return sum;
}

template <class T>
struct IsAnyPenalty : std::false_type {};
template <class Input, class Output, class Target>
struct IsAnyPenalty<AnyPenalty<Input, Output, Target>> : std::true_type {};
template <class T>
struct IsWeighted : std::false_type {};
template <class P>
struct IsWeighted<Weighted<P>> : std::true_type {};
template <class T>
struct IsPenaltySum : std::false_type {};
template <class... P>
struct IsPenaltySum<PenaltySum<P...>> : std::true_type {};

}  // namespace detail

/// A penalty, a weighted penalty, or a sum of them: what `Regularizer` takes as its third argument.
template <class T>
concept PenaltyExpression =
    Penalty<T> || detail::IsWeighted<T>::value || detail::IsPenaltySum<T>::value || detail::IsAnyPenalty<T>::value;

/// Gives a penalty a strength of its own.
template <Penalty P>
[[nodiscard]] Weighted<P> operator*(Strength strength, P penalty) {
  return {std::move(strength), std::move(penalty)};
}

/// The same: `GradientNorm{} * 0.01`.
template <Penalty P>
[[nodiscard]] Weighted<P> operator*(P penalty, Strength strength) {
  return {std::move(strength), std::move(penalty)};
}

/// Multiplies the strengths of a weighted penalty, or of each in a sum.
template <class Expression>
  requires(detail::IsWeighted<Expression>::value || detail::IsPenaltySum<Expression>::value)
[[nodiscard]] Expression operator*(const Strength& factor, Expression expression) {
  const auto scale = [&](auto& term) { term.strength = factor * term.strength; };
  if constexpr (detail::IsWeighted<Expression>::value) {
    scale(expression);
  } else {
    std::apply([&](auto&... term) { (scale(term), ...); }, expression.terms);
  }
  return expression;
}
/// The same with the factor behind.
template <class Expression>
  requires(detail::IsWeighted<Expression>::value || detail::IsPenaltySum<Expression>::value)
[[nodiscard]] Expression operator*(Expression expression, const Strength& factor) {
  return factor * std::move(expression);
}

/// Adds penalties up; a penalty without a strength of its own counts with 1.
template <PenaltyExpression A, PenaltyExpression B>
  requires(!detail::IsAnyPenalty<A>::value && !detail::IsAnyPenalty<B>::value)
[[nodiscard]] auto operator+(A a, B b) {
  auto left = detail::as_sum(std::move(a));
  auto right = detail::as_sum(std::move(b));
  return std::apply(
      [](auto&&... terms) { return PenaltySum<decltype(terms.penalty)...>{{std::forward<decltype(terms)>(terms)...}}; },
      std::tuple_cat(std::move(left.terms), std::move(right.terms)));
}

}  // namespace microreg::inline MICROREG_ABI

#if !defined(MICROREG_COMPILED)
#include <microreg/definitions/penalty.hpp>
#endif
