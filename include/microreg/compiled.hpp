/// @file
/// The definitions of all that is no template, for one file of a program of many: compiled once, not in every file.
///
/// CMake's target microreg::microreg brings that file along. Without CMake: define MICROREG_COMPILED for all files, and
/// write one that says no more than `#include <microreg/compiled.hpp>`. Without that file the linker misses
/// `register_fused_kernels` and `register_gate_kernels`. Without the definition including this header does nothing.
#pragma once

#include <microreg/fused/registration.hpp>
#include <microreg/gates/registration.hpp>
