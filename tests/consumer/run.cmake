# cmake -DMODE=... -DBUILD_DIR=... -DSOURCE_DIR=... -DWORK_DIR=... -DTORCH_PREFIX=... -DGENERATOR=... -DCXX=...
#       -DCXX_FLAGS=... -DINCLUDES=... -P run.cmake
# Builds and runs the consumer project from nothing, in a folder of its own, in one of these ways:
#     installed, fetched     by CMake: an installed package, the source tree
#     header_only, compiled  by the compiler alone, with nothing but include paths and libraries; the second with
#                            MICROREG_COMPILED and the one file that then has the definitions
function(step)
  execute_process(COMMAND ${ARGN} COMMAND_ECHO STDOUT COMMAND_ERROR_IS_FATAL ANY)
endfunction()

file(REMOVE_RECURSE "${WORK_DIR}")
file(MAKE_DIRECTORY "${WORK_DIR}")

if(MODE MATCHES "header_only|compiled")
  separate_arguments(flags UNIX_COMMAND "${CXX_FLAGS}")
  list(APPEND flags -std=c++20 "-I${SOURCE_DIR}/include")
  foreach(folder IN LISTS INCLUDES)
    list(APPEND flags -isystem "${folder}")
  endforeach()
  set(objects "${WORK_DIR}/main.o")
  if(MODE STREQUAL "compiled")
    list(APPEND flags -DMICROREG_COMPILED)
    file(WRITE "${WORK_DIR}/unit.cpp" "#include <microreg/compiled.hpp>\n")
    step("${CXX}" ${flags} -c "${WORK_DIR}/unit.cpp" -o "${WORK_DIR}/unit.o")
    list(APPEND objects "${WORK_DIR}/unit.o")
  endif()
  step("${CXX}" ${flags} -c "${CMAKE_CURRENT_LIST_DIR}/main.cpp" -o "${WORK_DIR}/main.o")
  step("${CXX}" ${flags} ${objects} -o "${WORK_DIR}/consumer" "-L${TORCH_PREFIX}/lib" "-Wl,-rpath,${TORCH_PREFIX}/lib"
       -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10)
  step("${WORK_DIR}/consumer")
  return()
endif()

# A release build, so that microreg decides nothing about optimisation, at the level that compiles fastest.
set(arguments "-DCMAKE_CXX_COMPILER=${CXX}" "-DCMAKE_CXX_FLAGS=${CXX_FLAGS}" -DCMAKE_CXX_FLAGS_RELEASE=-O0)
if(MODE STREQUAL "installed")
  step("${CMAKE_COMMAND}" --install "${BUILD_DIR}" --prefix "${WORK_DIR}/prefix")

  # A package that names folders of the machine it was built on cannot be moved to another, nor one with compiled parts.
  file(GLOB_RECURSE files "${WORK_DIR}/prefix/*")
  if(NOT files)
    message(FATAL_ERROR "nothing was installed into ${WORK_DIR}/prefix")
  endif()
  foreach(file IN LISTS files)
    if(NOT file MATCHES "\\.(hpp|cpp|cmake)$")
      message(FATAL_ERROR "the installed file ${file} is neither a source nor CMake's")
    endif()
    file(READ "${file}" text)
    foreach(folder IN ITEMS "${SOURCE_DIR}" "${BUILD_DIR}" "${WORK_DIR}" "${TORCH_PREFIX}")
      string(FIND "${text}" "${folder}" position)
      if(NOT position EQUAL -1)
        message(FATAL_ERROR "the installed file ${file} names ${folder}, a folder of the building machine")
      endif()
    endforeach()
  endforeach()
  # Nor does it know where it was installed.
  file(RENAME "${WORK_DIR}/prefix" "${WORK_DIR}/moved")
  set(ENV{CMAKE_PREFIX_PATH} "${WORK_DIR}/moved:${TORCH_PREFIX}")
else()
  set(ENV{CMAKE_PREFIX_PATH} "${TORCH_PREFIX}")
  list(APPEND arguments "-DMICROREG_SOURCE_DIR=${SOURCE_DIR}")
endif()

# What a debug build compiles: the library's part optimised, the user's files without the library's flags.
step("${CMAKE_COMMAND}" -S "${CMAKE_CURRENT_LIST_DIR}" -B "${WORK_DIR}/debug" -G "${GENERATOR}" ${arguments}
     -DCMAKE_BUILD_TYPE=Debug -DCMAKE_EXPORT_COMPILE_COMMANDS=ON)
file(STRINGS "${WORK_DIR}/debug/compile_commands.json" commands REGEX "\"command\"")
foreach(command IN LISTS commands)
  if(command MATCHES "/microreg\\.cpp" AND NOT command MATCHES " -O2 ")
    message(FATAL_ERROR "microreg is not optimised in a debug build: ${command}")
  elseif(command MATCHES "/(main|library)\\.cpp" AND command MATCHES " -(O[0-9]|fopenmp|w) ")
    message(FATAL_ERROR "a user's file is compiled with a flag of microreg's: ${command}")
  endif()
endforeach()

step("${CMAKE_COMMAND}" -S "${CMAKE_CURRENT_LIST_DIR}" -B "${WORK_DIR}/build" -G "${GENERATOR}" ${arguments}
     -DCMAKE_BUILD_TYPE=Release)
step("${CMAKE_COMMAND}" --build "${WORK_DIR}/build" --parallel 1)
step("${WORK_DIR}/build/consumer")
