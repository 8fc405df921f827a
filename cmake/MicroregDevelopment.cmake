# Shared by tests, examples and benchmarks: warnings, fmt, precompiled headers, since torch/torch.h takes 20 s to parse,
# and small files compiled together, since what a precompiled header leaves to each file that uses it takes 5 s more.
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_CXX_EXTENSIONS OFF)
if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type" FORCE)
endif()
option(MICROREG_GROUP_SOURCES "Compile small sources together: faster as a whole, slower after a change" ON)

find_package(fmt REQUIRED)

# For several processes. LibTorch has Gloo inside, but not Gloo's headers, which are all that is taken from elsewhere;
# MPI is its own. What needs them is left out, with a sentence, where they are not installed.
find_path(MICROREG_GLOO_HEADERS gloo/transport/device.h)
find_package(MPI QUIET COMPONENTS CXX)
add_library(microreg_gloo INTERFACE)
if(MICROREG_GLOO_HEADERS)
  target_include_directories(microreg_gloo SYSTEM INTERFACE "${MICROREG_GLOO_HEADERS}")
  target_compile_definitions(microreg_gloo INTERFACE USE_DISTRIBUTED USE_C10D_GLOO MICROREG_WITH_GLOO)
endif()
add_library(microreg_mpi INTERFACE)
if(MPI_CXX_FOUND)
  target_link_libraries(microreg_mpi INTERFACE MPI::MPI_CXX)
  target_compile_definitions(microreg_mpi INTERFACE OMPI_SKIP_MPICXX MICROREG_WITH_MPI)
endif()

# Graphs of CUDA, and making every wait for the device an error: a LibTorch for CUDA, and headers of CUDA's.
add_library(microreg_cuda INTERFACE)
if(EXISTS "${TORCH_INSTALL_PREFIX}/lib/libtorch_cuda.so")
  find_path(MICROREG_CUDA_HEADERS crt/host_defines.h
            HINTS /usr/local/cuda/include "${TORCH_INSTALL_PREFIX}/../nvidia/cu13/include")
  if(MICROREG_CUDA_HEADERS)
    target_include_directories(microreg_cuda SYSTEM INTERFACE "${MICROREG_CUDA_HEADERS}")
    target_link_libraries(microreg_cuda INTERFACE "${TORCH_INSTALL_PREFIX}/lib/libtorch_cuda.so"
                                                  "${TORCH_INSTALL_PREFIX}/lib/libc10_cuda.so")
    target_compile_definitions(microreg_cuda INTERFACE MICROREG_WITH_CUDA)
  endif()
endif()

set(microreg_warnings -Wall -Wextra -Wpedantic -Wshadow -Wconversion
                      $<$<BOOL:${MICROREG_WARNINGS_AS_ERRORS}>:-Werror>)
target_compile_options(microreg_compiled PRIVATE ${microreg_warnings})
set_target_properties(microreg_compiled PROPERTIES CXX_EXTENSIONS OFF EXPORT_COMPILE_COMMANDS ON)

# microreg_base: all but microreg, for the precompiled headers, which are the same however microreg is compiled.
add_library(microreg_base INTERFACE)
target_compile_features(microreg_base INTERFACE cxx_std_20)
# Header-only fmt: the LibTorch wheel carries newer fmt headers in its include folder, which win over the system's and
# must not meet a compiled fmt of another version.
target_link_libraries(microreg_base INTERFACE microreg::libtorch fmt::fmt-header-only)
target_compile_options(microreg_base INTERFACE ${microreg_warnings})

add_library(microreg_development INTERFACE)
target_link_libraries(microreg_development INTERFACE microreg_base microreg::microreg)

# An object library whose precompiled header every other target reuses.
file(WRITE "${CMAKE_BINARY_DIR}/precompiled.cpp" "")
add_library(microreg_precompiled OBJECT "${CMAKE_BINARY_DIR}/precompiled.cpp")
target_link_libraries(microreg_precompiled PRIVATE microreg_base)
target_precompile_headers(microreg_precompiled PRIVATE <torch/torch.h> <fmt/format.h>)
set_target_properties(microreg_precompiled PROPERTIES CXX_CLANG_TIDY "")  # nothing of ours in it

# microreg_group_sources(target count): compiles so many sources of a target as one file.
function(microreg_group_sources target count)
  set_target_properties(${target} PROPERTIES UNITY_BUILD ${MICROREG_GROUP_SOURCES} UNITY_BUILD_BATCH_SIZE ${count})
endfunction()

# microreg_executable(name source...): an executable with warnings and the precompiled header.
function(microreg_executable name)
  add_executable(${name} ${ARGN})
  target_link_libraries(${name} PRIVATE microreg_development)
  target_precompile_headers(${name} REUSE_FROM microreg_precompiled)
endfunction()

# For tests. Most of their time is the compiler's, and what they spend themselves they spend in LibTorch and in the
# compiled part of the library, so they are compiled at -O0. GCC uses a precompiled header with the flags alone that it
# was made with, so they have one of their own, with Catch2; and -fPIC, so that the tests' shared objects can use it.
if(MICROREG_BUILD_TESTS)
  find_package(Catch2 REQUIRED)
  add_library(microreg_test_base INTERFACE)
  target_link_libraries(microreg_test_base INTERFACE microreg_base Catch2::Catch2)
  target_compile_options(microreg_test_base INTERFACE -O0 -fPIC)
  target_include_directories(microreg_test_base INTERFACE "${PROJECT_SOURCE_DIR}/tests")

  add_library(microreg_test_development INTERFACE)
  target_link_libraries(microreg_test_development INTERFACE microreg_test_base microreg::microreg)

  add_library(microreg_test_precompiled OBJECT "${CMAKE_BINARY_DIR}/precompiled.cpp")
  target_link_libraries(microreg_test_precompiled PRIVATE microreg_test_base)
  target_precompile_headers(microreg_test_precompiled PRIVATE <torch/torch.h> <fmt/format.h>
                            "${PROJECT_SOURCE_DIR}/tests/catch.hpp")
  set_target_properties(microreg_test_precompiled PROPERTIES CXX_CLANG_TIDY "")

  # Catch2's main function is configured before its header is read, so it goes without the precompiled one.
  add_library(microreg_test_main OBJECT "${PROJECT_SOURCE_DIR}/tests/main.cpp")
  target_link_libraries(microreg_test_main PRIVATE Catch2::Catch2)
  target_compile_options(microreg_test_main PRIVATE -O0)
endif()

# microreg_test_executable(name source...): a Catch2 program of these sources and tests/main.cpp.
function(microreg_test_executable name)
  add_executable(${name} $<TARGET_OBJECTS:microreg_test_main> ${ARGN})
  target_link_libraries(${name} PRIVATE microreg_test_development)
  target_precompile_headers(${name} REUSE_FROM microreg_test_precompiled)
endfunction()

# microreg_add_tests(target [PREFIX prefix] [THREADED file...]): one test for each file test_*.cpp of a Catch2 program,
# not for each test case, of which hundreds would load LibTorch anew. They run on one thread: where the cores have other
# work, the threads of a small operation wait for each other ten times longer than it takes. Those that are THREADED, for
# what is divided among threads, have two, which wait without keeping a core busy.
function(microreg_add_tests target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "PREFIX" "THREADED")
  get_target_property(sources ${target} SOURCES)
  foreach(source IN LISTS sources)
    get_filename_component(name "${source}" NAME_WE)
    if(NOT name MATCHES "^test_(.*)$")
      continue()
    endif()
    set(test "${arg_PREFIX}${CMAKE_MATCH_1}")
    add_test(NAME "${test}" COMMAND ${target} --filenames-as-tags --warn NoTests "[#${name}]")
    if(source IN_LIST arg_THREADED)
      set_tests_properties("${test}" PROPERTIES ENVIRONMENT "OMP_NUM_THREADS=2;OMP_WAIT_POLICY=passive" PROCESSORS 2)
    else()
      set_tests_properties("${test}" PROPERTIES ENVIRONMENT OMP_NUM_THREADS=1)
    endif()
  endforeach()
endfunction()
