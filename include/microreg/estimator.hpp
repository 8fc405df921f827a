/// @file
/// The ways to differentiate a penalty, as options: one of them is the `estimator` of RegularizerOptions.
#pragma once

#include <microreg/difference.hpp>
#include <microreg/version.hpp>

#include <memory>
#include <variant>

namespace microreg::inline MICROREG_ABI {

/// Double backward: exact for every network. Cost: 3.0 plain steps for one penalty, in exact arithmetic.
struct Exact {};

namespace detail {
class Differences;
struct DifferenceRequest;
using MakeDifferences = std::unique_ptr<Differences>(const DifferenceRequest& request);
MakeDifferences make_differences;
}  // namespace detail

/// Any of them. What makes a difference is referred to where one is chosen: a header-only program that takes Exact
/// compiles none of it.
class Estimator : public std::variant<Exact, ForwardDifference, CentralDifference> {
 public:
  /// Converts from Exact, the default.
  Estimator(Exact exact = {}) : variant(exact) {}  // NOLINT(google-explicit-constructor): and so on
  /// Converts from a difference, whose numbers Regularizer and Penalised check: OptionError.
  Estimator(ForwardDifference forward) : variant(forward), differences_(detail::make_differences) {}  // NOLINT
  /// The same for two displaced gradients.
  Estimator(CentralDifference central) : variant(central), differences_(detail::make_differences) {}  // NOLINT

  /// Assign instead, which brings what makes a difference.
  template <class...>
  void emplace() = delete;
  void swap(std::variant<Exact, ForwardDifference, CentralDifference>& other) = delete;  ///< std::swap does it

  /// Whether the parameters themselves are displaced, by penalties that count their gradient.
  [[nodiscard]] bool displaces_parameters() const {
    return std::visit(
        [](const auto& each) {
          if constexpr (requires { each.displace; }) {
            return each.displace == Displace::parameters;
          } else {
            return false;
          }
        },
        static_cast<const variant&>(*this));
  }

  /// Null for Exact.
  [[nodiscard]] detail::MakeDifferences* differences() const noexcept { return differences_; }

 private:
  detail::MakeDifferences* differences_ = nullptr;
};

}  // namespace microreg::inline MICROREG_ABI

#if !defined(MICROREG_COMPILED)
#include <microreg/definitions/estimator.hpp>
#endif
