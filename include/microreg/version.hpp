/// @file
/// The version of microreg, for the preprocessor and for people. Semantic versioning.
#pragma once

#define MICROREG_VERSION_MAJOR 0
#define MICROREG_VERSION_MINOR 1
#define MICROREG_VERSION_PATCH 0

namespace microreg {

/// `"major.minor.patch"`.
inline constexpr const char* version = "0.1.0";

}  // namespace microreg
