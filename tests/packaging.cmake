# Tests of the package: that two translation units link, that wrong code is refused with a readable message, that
# headers stand alone (on request), and that other projects can use the library both ways.
microreg_executable(microreg_two_units two_units/first.cpp two_units/second.cpp)
add_test(NAME two_units COMMAND microreg_two_units)

add_subdirectory(compile_fail)
add_subdirectory(headers)

foreach(mode IN ITEMS installed fetched)
  add_test(
    NAME consumer.${mode}
    COMMAND
      "${CMAKE_COMMAND}" "-DMODE=${mode}" "-DBUILD_DIR=${PROJECT_BINARY_DIR}" "-DSOURCE_DIR=${PROJECT_SOURCE_DIR}"
      "-DWORK_DIR=${CMAKE_CURRENT_BINARY_DIR}/consumer_${mode}" "-DTORCH_PREFIX=${TORCH_INSTALL_PREFIX}"
      "-DGENERATOR=${CMAKE_GENERATOR}" "-DCXX=${CMAKE_CXX_COMPILER}" "-DCXX_FLAGS=${CMAKE_CXX_FLAGS}"
      "-DBUILD_TYPE=${CMAKE_BUILD_TYPE}" -P "${CMAKE_CURRENT_SOURCE_DIR}/consumer/run.cmake")
endforeach()
