/// @file
/// Catch2, version 2 or 3, whichever is installed. After LibTorch's logging, which has a CHECK of its own that would
/// otherwise take the place of Catch2's and fail no test.
#pragma once

#if __has_include(<c10/util/Logging.h>)
#include <c10/util/Logging.h>
#endif

#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif
