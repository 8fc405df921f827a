/// @file
/// Everything but the fmt formatters (microreg/format.hpp).
#pragma once

#include <microreg/distributions.hpp>
#include <microreg/error.hpp>
#include <microreg/estimators/estimator.hpp>
#include <microreg/fused/scope.hpp>
#include <microreg/gates/scope.hpp>
#include <microreg/grafting.hpp>
#include <microreg/measure.hpp>
#include <microreg/micro_batch.hpp>
#include <microreg/model.hpp>
#include <microreg/options.hpp>
#include <microreg/parameters.hpp>
#include <microreg/penalties/fisher_trace.hpp>
#include <microreg/penalties/gradient_norm.hpp>
#include <microreg/penalties/input_jacobian.hpp>
#include <microreg/penalties/jacobian.hpp>
#include <microreg/penalties/unsquared.hpp>
#include <microreg/penalty.hpp>
#include <microreg/regularizer.hpp>
#include <microreg/report.hpp>
#include <microreg/squared_gradient_norm.hpp>
#include <microreg/strength.hpp>
#include <microreg/version.hpp>
