# cmake -DMODE=installed|fetched -DBUILD_DIR=... -DSOURCE_DIR=... -DWORK_DIR=... -DTORCH_PREFIX=... -DGENERATOR=...
#       -DCXX=... -DCXX_FLAGS=... -DBUILD_TYPE=... -P run.cmake
# Builds and runs the consumer project from nothing, in a folder of its own.
function(step)
  execute_process(COMMAND ${ARGN} COMMAND_ECHO STDOUT COMMAND_ERROR_IS_FATAL ANY)
endfunction()

file(REMOVE_RECURSE "${WORK_DIR}")
set(arguments "-DCMAKE_CXX_COMPILER=${CXX}" "-DCMAKE_CXX_FLAGS=${CXX_FLAGS}" "-DCMAKE_BUILD_TYPE=${BUILD_TYPE}")
if(MODE STREQUAL "installed")
  step("${CMAKE_COMMAND}" --install "${BUILD_DIR}" --prefix "${WORK_DIR}/prefix")

  # A package that names folders of the machine it was built on cannot be moved to another.
  file(GLOB_RECURSE files "${WORK_DIR}/prefix/*")
  if(NOT files)
    message(FATAL_ERROR "nothing was installed into ${WORK_DIR}/prefix")
  endif()
  foreach(file IN LISTS files)
    file(READ "${file}" text)
    foreach(folder IN ITEMS "${SOURCE_DIR}" "${BUILD_DIR}" "${WORK_DIR}" "${TORCH_PREFIX}")
      string(FIND "${text}" "${folder}" position)
      if(NOT position EQUAL -1)
        message(FATAL_ERROR "the installed file ${file} names ${folder}, a folder of the building machine")
      endif()
    endforeach()
  endforeach()
  set(ENV{CMAKE_PREFIX_PATH} "${WORK_DIR}/prefix:${TORCH_PREFIX}")
else()
  set(ENV{CMAKE_PREFIX_PATH} "${TORCH_PREFIX}")
  list(APPEND arguments "-DMICROREG_SOURCE_DIR=${SOURCE_DIR}")
endif()

step("${CMAKE_COMMAND}" -S "${CMAKE_CURRENT_LIST_DIR}" -B "${WORK_DIR}/build" -G "${GENERATOR}" ${arguments})
step("${CMAKE_COMMAND}" --build "${WORK_DIR}/build")
step("${WORK_DIR}/build/consumer")
