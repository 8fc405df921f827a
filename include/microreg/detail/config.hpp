/// @file
/// Whether what is no template is compiled in every file that uses it, or once a program.
///
/// By `#include` alone the library is header-only. Where MICROREG_COMPILED is defined, the headers only declare what is
/// no template, and one file of the program, which includes <microreg/compiled.hpp>, has the definitions. The CMake
/// target microreg::microreg does both by itself.
#pragma once

#include <microreg/version.hpp>

#if defined(MICROREG_COMPILED)
#define MICROREG_INLINE
#else
#define MICROREG_INLINE inline
#endif

// Around what decides and waits for LibTorch's kernels, in files that are header-only: there a full optimisation costs
// every user's compiler seconds and gains nothing. Kernels of our own stand outside of it. Without optimisation there
// is nothing to leave out.
#if defined(__GNUC__) && !defined(__clang__) && defined(__OPTIMIZE__) && !defined(MICROREG_COMPILED)
#define MICROREG_LIGHTLY_OPTIMIZED _Pragma("GCC push_options") _Pragma("GCC optimize(\"O1\")")
#define MICROREG_FULLY_OPTIMIZED _Pragma("GCC pop_options")
#else
#define MICROREG_LIGHTLY_OPTIMIZED
#define MICROREG_FULLY_OPTIMIZED
#endif
