/// @file
/// Everything but the fmt formatters (microreg/format.hpp) and verify() (microreg/verify.hpp).
#pragma once

// GCC reports C++17 as 201703, and C++20 as 201709 where it is told -std=c++2a.
#if __cplusplus < 201709L && !(defined(_MSVC_LANG) && _MSVC_LANG >= 202002L)
#error "microreg needs C++20: compile this file with -std=c++20 (the others of your program may stay as they are)"
#else

#include <microreg/any_penalty.hpp>
#include <microreg/autocast.hpp>
#include <microreg/batch.hpp>
#include <microreg/counted_loss.hpp>
#include <microreg/distributions.hpp>
#include <microreg/error.hpp>
#include <microreg/estimator.hpp>
#include <microreg/fused/scope.hpp>
#include <microreg/gates/scope.hpp>
#include <microreg/grafting.hpp>
#include <microreg/measure.hpp>
#include <microreg/micro_batches.hpp>
#include <microreg/model.hpp>
#include <microreg/options.hpp>
#include <microreg/parameters.hpp>
#include <microreg/penalised.hpp>
#include <microreg/penalties/average_jacobian.hpp>
#include <microreg/penalties/fisher_trace.hpp>
#include <microreg/penalties/gradient_norm.hpp>
#include <microreg/penalties/input_jacobian.hpp>
#include <microreg/penalties/jacobian_norm.hpp>
#include <microreg/penalties/unit_jacobian.hpp>
#include <microreg/penalties/unsquared.hpp>
#include <microreg/penalty.hpp>
#include <microreg/regularizer.hpp>
#include <microreg/report.hpp>
#include <microreg/squared_gradient_norm.hpp>
#include <microreg/strength.hpp>
#include <microreg/version.hpp>

#endif
