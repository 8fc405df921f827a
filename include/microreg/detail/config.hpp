/// @file
/// Whether this file compiles what is no template, or leaves it to one unit of the program.
#pragma once

/// Headers declare. Where MICROREG_COMPILED is not defined they include their definitions too, as inline functions:
/// header-only. Where it is defined, for all files of a program, one of them includes <microreg/compiled.hpp>. CMake's
/// target microreg::microreg does that by itself.
#if defined(MICROREG_COMPILED)
#define MICROREG_INLINE
#else
#define MICROREG_INLINE inline
#endif
