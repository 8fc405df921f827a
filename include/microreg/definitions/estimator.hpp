/// @file
/// Definitions of estimator.hpp.
#pragma once

#include <microreg/step/finite_difference.hpp>
