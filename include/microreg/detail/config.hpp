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
