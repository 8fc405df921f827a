/// @file
/// All kernels in one file of a program, for a program of many: compiled once, not in every file that takes a step.
///
/// Define MICROREG_KERNELS_ELSEWHERE for all files (target_compile_definitions), and write one that says no more than
/// `#include <microreg/kernels.hpp>`. Without that file the linker misses `register_fused_kernels` and
/// `register_gate_kernels`. Without the definition including this header does nothing.
#pragma once

#include <microreg/fused/registration.hpp>
#include <microreg/gates/registration.hpp>
