# Shared by tests, examples and benchmarks: warnings, fmt, and one precompiled header, since torch/torch.h takes 20 s to
# parse.
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_CXX_EXTENSIONS OFF)
if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()

find_package(fmt REQUIRED)

add_library(microreg_development INTERFACE)
# Header-only fmt: the LibTorch wheel carries newer fmt headers in its include folder, which win over the system's and
# must not meet a compiled fmt of another version.
target_link_libraries(microreg_development INTERFACE microreg::microreg fmt::fmt-header-only)
target_compile_options(
  microreg_development
  INTERFACE -Wall
            -Wextra
            -Wpedantic
            -Wshadow
            -Wconversion
            $<$<BOOL:${MICROREG_WARNINGS_AS_ERRORS}>:-Werror>)

# An object library whose precompiled header every other target reuses.
file(WRITE "${CMAKE_BINARY_DIR}/precompiled.cpp" "")
add_library(microreg_precompiled OBJECT "${CMAKE_BINARY_DIR}/precompiled.cpp")
target_link_libraries(microreg_precompiled PRIVATE microreg_development)
target_precompile_headers(microreg_precompiled PRIVATE <torch/torch.h> <fmt/format.h>)
set_target_properties(microreg_precompiled PROPERTIES CXX_CLANG_TIDY "")  # nothing of ours in it

# microreg_executable(name source...): an executable with warnings and the precompiled header.
function(microreg_executable name)
  add_executable(${name} ${ARGN})
  target_link_libraries(${name} PRIVATE microreg_development)
  target_precompile_headers(${name} REUSE_FROM microreg_precompiled)
endfunction()

# For tests. Most of their time is the compiler's, so they are compiled at -O1. GCC can use a precompiled header at the
# level alone that it was made at, so they have one of their own, with Catch2.
if(MICROREG_BUILD_TESTS)
  find_package(Catch2 REQUIRED)
  add_library(microreg_test_development INTERFACE)
  target_link_libraries(microreg_test_development INTERFACE microreg_development Catch2::Catch2)
  target_compile_options(microreg_test_development INTERFACE $<$<NOT:$<CONFIG:Debug>>:-O1>)
  target_include_directories(microreg_test_development INTERFACE "${PROJECT_SOURCE_DIR}/tests")

  add_library(microreg_test_precompiled OBJECT "${CMAKE_BINARY_DIR}/precompiled.cpp")
  target_link_libraries(microreg_test_precompiled PRIVATE microreg_test_development)
  target_precompile_headers(microreg_test_precompiled PRIVATE <torch/torch.h> <fmt/format.h>
                            "${PROJECT_SOURCE_DIR}/tests/catch.hpp")
  set_target_properties(microreg_test_precompiled PROPERTIES CXX_CLANG_TIDY "")
endif()

# microreg_test_executable(name source...): a Catch2 program of these sources and tests/main.cpp.
function(microreg_test_executable name)
  # Catch2's main function is configured before its header is read, so it goes without the precompiled one.
  set_source_files_properties("${PROJECT_SOURCE_DIR}/tests/main.cpp" PROPERTIES SKIP_PRECOMPILE_HEADERS ON)
  add_executable(${name} "${PROJECT_SOURCE_DIR}/tests/main.cpp" ${ARGN})
  target_link_libraries(${name} PRIVATE microreg_test_development)
  target_precompile_headers(${name} REUSE_FROM microreg_test_precompiled)
endfunction()
