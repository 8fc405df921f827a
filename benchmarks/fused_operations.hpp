/// @file
/// What each fused operation is worth: the others are left to LibTorch.
#pragma once

#include <microreg/detail/interceptors.hpp>
#include <microreg/fused/rules.hpp>

#include <torch/library.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

/// Intercepts these alone, named without "aten::"; "none" names nothing. To be called before the first scope of the
/// process: where a kernel stands already, one that hands everything on, microreg registers none.
inline void limit_fused_operations(const std::vector<std::string>& chosen) {
  using namespace microreg::detail;
  static torch::Library library(torch::Library::IMPL, "aten", interception_key, __FILE__, __LINE__);
  std::vector<std::string> unknown = chosen;
  std::erase(unknown, "none");
  for (const Rule* rule : fused_rules) {
    const std::string operation = operation_of(*rule), name = operation.substr(std::string("aten::").size());
    std::erase(unknown, name);
    if (std::find(chosen.begin(), chosen.end(), name) == chosen.end() && find_operation(operation).has_value()) {
      library.impl(operation.c_str(), torch::CppFunction::makeFallthrough());
    }
  }
  if (!unknown.empty()) {
    throw std::invalid_argument("--fused-operations: microreg fuses no " + unknown.front());
  }
}
