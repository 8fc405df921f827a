/// @file
/// AnyPenalty: a penalty that is chosen at run time.
#pragma once

#include <microreg/version.hpp>

#include <microreg/penalty.hpp>
#include <microreg/strength.hpp>

#include <cstddef>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI {

namespace detail {

/// What a step knows of one penalty, apart from its probes.
struct TermInfo {
  std::string name;
  Strength strength;
  bool squared;   ///< R_M is the squared norm, or the norm itself
  bool by_input;  ///< the probes are differentiated by the input instead of the parameters
};

template <class Pass>
struct Term : TermInfo {
  std::function<std::vector<at::Tensor>(const Pass&)> probes;
};

template <class Pass, class P>
Term<Pass> term_of(Weighted<P> weighted) {
  static_assert(PenaltyFor<P, Pass>,
                "microreg: this penalty cannot be evaluated on this model: it must offer probe(pass) that returns a "
                "scalar torch::Tensor, where pass.output is what the model returns");
  return {{std::string(weighted.penalty.name()), std::move(weighted.strength), is_squared<P>, differentiates_input<P>},
          [penalty = std::move(weighted.penalty)](const Pass& pass) -> std::vector<at::Tensor> {
            if constexpr (requires { penalty.probes(pass); }) {
              return penalty.probes(pass);
            } else {
              return {penalty.probe(pass)};
            }
          }};
}

}  // namespace detail

/// Any penalty, or sum of penalties, on models with these types of input, output and target: one type to hold, to
/// return from a function and to choose from a configuration file.
///
/// ```cpp
/// microreg::AnyPenalty<> penalty = microreg::GradientNorm{};
/// if (name == "fisher-trace") {
///   penalty = 0.1 * microreg::FisherTrace{};
/// }
/// ```
///
/// It adds up with other penalties and takes a strength as they do. Made without a penalty it is none: the loss alone.
template <class Input = at::Tensor, class Output = at::Tensor, class Target = at::Tensor>
class AnyPenalty {
 public:
  using Pass = ForwardPass<Input, Output, Target>;  ///< what the probes of its penalties read

  AnyPenalty() = default;
  /// A penalty, a weighted one or a sum of them. Does not compile where one of them cannot be evaluated on Pass.
  template <class P>
    requires(!detail::IsAnyPenalty<P>::value && PenaltyExpression<P>)
  AnyPenalty(P penalty) {  // NOLINT(google-explicit-constructor): as every penalty is one
    std::apply([&](auto&&... term) { (terms_.push_back(detail::term_of<Pass>(std::move(term))), ...); },
               detail::as_sum(std::move(penalty)).terms);
  }

  /// Adds the penalties of `other`, each with its own strength.
  AnyPenalty& operator+=(AnyPenalty other) {  // a copy: it may be this one
    terms_.insert(terms_.end(), other.terms_.begin(), other.terms_.end());
    return *this;
  }
  [[nodiscard]] friend AnyPenalty operator+(AnyPenalty a, const AnyPenalty& b) { return a += b; }
  [[nodiscard]] friend AnyPenalty operator*(const Strength& factor, AnyPenalty penalty) {
    for (auto& term : penalty.terms_) {
      term.strength = factor * term.strength;
    }
    return penalty;
  }
  [[nodiscard]] friend AnyPenalty operator*(AnyPenalty penalty, const Strength& factor) {
    return factor * std::move(penalty);
  }

  /// How many penalties it adds up.
  [[nodiscard]] std::size_t size() const noexcept { return terms_.size(); }
  /// Name, strength and probes of each, in the order of the sum.
  [[nodiscard]] const std::vector<detail::Term<Pass>>& terms() const noexcept { return terms_; }

 private:
  std::vector<detail::Term<Pass>> terms_;
};
template <class P>
AnyPenalty(P) -> AnyPenalty<>;  ///< on tensors, since a penalty does not tell what the model takes and returns

namespace detail {

/// `expression` as a penalty on passes of these types.
template <class Input, class Output, class Target, class Expression>
AnyPenalty<Input, Output, Target> as_any_penalty(Expression expression) {
  using Result = AnyPenalty<Input, Output, Target>;
  static_assert(PenaltyExpression<Expression>,
                "microreg: this is not a penalty: pass GradientNorm{}, FisherTrace{}, a sum such as 0.01 * "
                "GradientNorm{} + 1e-3 * UnitJacobian{}, or SquaredGradientNorm{probe} for a probe of your own; a type "
                "of your own must offer name() and probe(pass)");
  static_assert(!IsAnyPenalty<Expression>::value || std::is_same_v<Expression, Result>,
                "microreg: this AnyPenalty is for other types than the model's: name its template arguments "
                "AnyPenalty<Input, Output, Target>, what the model takes and returns and the type of the target");
  if constexpr (std::is_convertible_v<Expression, Result>) {
    return Result(std::move(expression));
  } else {
    return {};
  }
}

}  // namespace detail

}  // namespace microreg::inline MICROREG_ABI
