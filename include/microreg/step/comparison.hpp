/// @file
/// How far two gradients of the penalties are apart, and what to say about it.
#pragma once

#include <ATen/ATen.h>
#include <microreg/detail/finite.hpp>
#include <microreg/detail/text.hpp>
#include <microreg/parameters.hpp>
#include <microreg/step/tensor_lists.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail {

/// The distance of one gradient from another that is taken for right, all parameters jointly, in float64 on the host.
struct Comparison {
  double distance = 0;                                ///< of the gradients
  double norm = 0;                                    ///< of the right one
  std::vector<std::pair<double, std::size_t>> worst;  ///< distances by parameter, the largest first

  [[nodiscard]] bool finite() const { return is_finite(distance) && is_finite(norm); }
  [[nodiscard]] double error() const {
    return norm > 0 && finite() ? distance / norm : distance > 0 || !finite() ? 1e300 : 0.0;
  }
};

inline Comparison compare(const std::vector<at::Tensor>& found, const std::vector<at::Tensor>& right) {
  Comparison result;
  result.norm = norm_of(right);
  const std::vector<at::Tensor> apart = differences(found, right);
  for (std::size_t i = 0; i < apart.size(); ++i) {
    const double distance = norm_of({apart[i]});
    result.distance = std::hypot(result.distance, distance);
    result.worst.emplace_back(distance, i);
  }
  // By a heap: clang warns of what std::stable_sort does in libstdc++, and std::sort must not meet a NaN.
  std::partial_sort(result.worst.begin(), result.worst.end(), result.worst.end(), [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  });
  return result;
}

/// 0.0312 as "3.1 %", with a factor of ten and more as such.
inline std::string in_percent(double share) {
  return share < 10 ? text({share * 100, " %"}) : text({"a factor of ", share});
}

/// "most of it in fc1.weight [64, 20], ..".
inline std::string where_it_is(const Comparison& comparison, const Parameters& parameters) {
  std::string result;
  for (std::size_t k = 0; k < std::min<std::size_t>(3, comparison.worst.size()); ++k) {
    const auto [distance, i] = comparison.worst[k];
    if (distance > 0.1 * comparison.distance) {
      result += text(
          {result.empty() ? "most of it in " : ", ", parameters.names[i], " of shape ", parameters.tensors[i].sizes()});
    }
  }
  return result;
}

}  // namespace microreg::inline MICROREG_ABI::detail
