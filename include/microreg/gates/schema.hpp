/// @file
/// What a kernel knows of its operation's schema, and whether this LibTorch's is such a one.
#pragma once

#include <ATen/core/function_schema.h>
#include <microreg/detail/config.hpp>

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace microreg::inline MICROREG_ABI::detail::gating {

/// Operations of which one kernel knows the same.
struct Operations {
  const char* schema;                        ///< as is_known() has it
  std::initializer_list<const char*> names;  ///< with their overloads after a dot
};

/// Words of a schema as the words of a pattern, in which "..." is any number of them.
inline bool matches(std::span<const std::string> words, std::span<const std::string> pattern) {
  if (pattern.empty()) {
    return words.empty();
  }
  if (pattern.front() == "...") {
    return matches(words, pattern.subspan(1)) || (!words.empty() && matches(words.subspan(1), pattern));
  }
  return !words.empty() && words.front() == pattern.front() && matches(words.subspan(1), pattern.subspan(1));
}

inline std::vector<std::string> words_of(std::string_view list) {
  std::vector<std::string> result;
  while (!list.empty()) {
    const std::size_t end = std::min(list.find(", "), list.size());
    result.emplace_back(list.substr(0, end));
    list.remove_prefix(std::min(end + 2, list.size()));
  }
  return result;
}

/// Whether a schema is as a kernel was written for. `known` has the arguments as in native_functions.yaml, without
/// defaults, and after " -> " the types of the results: one tensor, where it says nothing of them. "..." stands for
/// those that the kernel does not read, whatever they are:
///
///     "Tensor self, int[] dim, bool keepdim"    "Tensor self, ... -> Tensor, Tensor"    "..., int mode, ... -> ..."
inline bool is_known(const c10::FunctionSchema& schema, std::string_view known) {
  constexpr std::string_view arrow = " -> ";
  const std::size_t end = known.find(arrow);
  std::vector<std::string> arguments, results;
  for (const c10::Argument& argument : schema.arguments()) {
    arguments.push_back(argument.type()->str() + ' ' + argument.name());
  }
  for (const c10::Argument& result : schema.returns()) {
    results.push_back(result.type()->str());
  }
  return matches(arguments, words_of(known.substr(0, end))) &&
         matches(results, words_of(end == std::string_view::npos ? "Tensor" : known.substr(end + arrow.size())));
}

}  // namespace microreg::inline MICROREG_ABI::detail::gating
