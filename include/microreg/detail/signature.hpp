/// @file
/// What a function takes, where its declaration says it: no template, no overloads.
#pragma once

#include <microreg/version.hpp>

#include <tuple>
#include <type_traits>

namespace microreg::inline MICROREG_ABI::detail {

/// The arguments of a function, without references and const; `known` is false for templates and overloads.
template <class Function>
struct Signature {
  static constexpr bool known = false;
};
template <class R, class... A>
struct Signature<R(A...)> {
  static constexpr bool known = true;
  using Arguments = std::tuple<std::remove_cvref_t<A>...>;
};
template <class R, class... A>
struct Signature<R (*)(A...)> : Signature<R(A...)> {};
template <class R, class C, class... A>
struct Signature<R (C::*)(A...)> : Signature<R(A...)> {};
template <class R, class C, class... A>
struct Signature<R (C::*)(A...) const> : Signature<R(A...)> {};
template <class R, class C, class... A>
struct Signature<R (C::*)(A...) noexcept> : Signature<R(A...)> {};
template <class R, class C, class... A>
struct Signature<R (C::*)(A...) const noexcept> : Signature<R(A...)> {};
template <class F>
  requires requires { &F::operator(); }
struct Signature<F> : Signature<decltype(&F::operator())> {};
template <class F>
  requires(
      !requires { &F::operator(); } && requires { &F::forward; })
struct Signature<F> : Signature<decltype(&F::forward)> {};

/// Whether F, a function or a class with forward(), can be called with A...
template <class F, class... A>
inline constexpr bool callable_with = std::is_invocable_v<F&, A&...> || requires(F& f, A&... a) { f.forward(a...); };

}  // namespace microreg::inline MICROREG_ABI::detail
