/// @file
/// All that is no template, in one file of a program: compiled once, not in every file that uses the library.
///
/// Define MICROREG_COMPILED for all files, and write one that says no more than `#include <microreg/compiled.hpp>`.
/// CMake's target microreg::microreg does both. Without that file the linker misses functions of microreg::detail;
/// without the definition including this header does nothing.
#pragma once

#include <microreg/definitions/autocast.hpp>
#include <microreg/definitions/batch.hpp>
#include <microreg/definitions/distributed.hpp>
#include <microreg/definitions/estimator.hpp>
#include <microreg/definitions/grafting.hpp>
#include <microreg/definitions/model.hpp>
#include <microreg/definitions/objective.hpp>
#include <microreg/definitions/options.hpp>
#include <microreg/definitions/parameters.hpp>
#include <microreg/definitions/penalised.hpp>
#include <microreg/definitions/penalty.hpp>
#include <microreg/definitions/regularizer.hpp>
#include <microreg/definitions/report.hpp>
#include <microreg/definitions/squared_gradient_norm.hpp>
#include <microreg/definitions/step.hpp>
#include <microreg/definitions/strength.hpp>
#include <microreg/definitions/text.hpp>
#include <microreg/definitions/verification.hpp>
#include <microreg/definitions/verify.hpp>
#include <microreg/fused/registration.hpp>
#include <microreg/gates/registration.hpp>
