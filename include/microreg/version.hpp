/// @file
/// The version of microreg, for the preprocessor, for people and for the linker. Semantic versioning.
#pragma once

#define MICROREG_VERSION_MAJOR 0  ///< 0 until the interface is settled
#define MICROREG_VERSION_MINOR 1  ///< may break the interface until then
#define MICROREG_VERSION_PATCH 0  ///< corrections alone; another version to the linker all the same

// An inline namespace of the version, in which everything is: `microreg::Regularizer` is microreg::v0_1_0::Regularizer
// to the linker. Two versions in one process, in two plugins for instance, share no function and no type; handing an
// object of one to code of the other does not link.
#define MICROREG_ABI_OF(major, minor, patch) v##major##_##minor##_##patch
#define MICROREG_ABI_FROM(major, minor, patch) MICROREG_ABI_OF(major, minor, patch)
#define MICROREG_ABI MICROREG_ABI_FROM(MICROREG_VERSION_MAJOR, MICROREG_VERSION_MINOR, MICROREG_VERSION_PATCH)

namespace microreg::inline MICROREG_ABI {

/// `"major.minor.patch"`.
inline constexpr const char* version = "0.1.0";

}  // namespace microreg::inline MICROREG_ABI
