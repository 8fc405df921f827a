/// @file
/// JSON as the records have it, from files that may hold anything.
#pragma once

#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string_view>

namespace cifar {

using Json = nlohmann::ordered_json;

/// `text` as JSON. Throws std::exception where it is none, and where it is nested deeper than anything recorded: what
/// compares and prints values calls itself at every level.
[[nodiscard]] inline Json parsed(std::string_view text) {
  return Json::parse(text, [](int depth, Json::parse_event_t, const Json&) {
    constexpr int deepest = 8;
    if (depth > deepest) {
      throw std::runtime_error("it is nested too deeply");
    }
    return true;
  });
}

}  // namespace cifar
