# Tests of the package: that two translation units link, that two shared objects share a process, that wrong code is
# refused with a readable message, that headers stand alone (on request), and that other projects can use the library in
# each way there is.

# By #include alone, as who does not use CMake has it: there a function that is not inline would be defined twice.
add_library(microreg_test_header_only INTERFACE)
target_link_libraries(microreg_test_header_only INTERFACE microreg_test_base)
target_include_directories(microreg_test_header_only INTERFACE "${microreg_include_dir}")

add_executable(microreg_two_units two_units/first.cpp two_units/second.cpp)
target_link_libraries(microreg_two_units PRIVATE microreg_test_header_only)
target_precompile_headers(microreg_two_units REUSE_FROM microreg_test_precompiled)
add_test(NAME two_units COMMAND microreg_two_units)

# One object file in two modules with hidden symbols, as two extension modules would have them.
add_library(microreg_object OBJECT two_objects/object.cpp)
set_target_properties(microreg_object PROPERTIES CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON)
target_link_libraries(microreg_object PRIVATE microreg_test_header_only)
target_precompile_headers(microreg_object REUSE_FROM microreg_test_precompiled)
foreach(object IN ITEMS a b)
  add_library(microreg_object_${object} MODULE $<TARGET_OBJECTS:microreg_object>)
  target_link_libraries(microreg_object_${object} PRIVATE microreg_test_header_only)
endforeach()
# It includes nothing of LibTorch's or ours.
add_executable(microreg_two_objects two_objects/main.cpp)
target_compile_features(microreg_two_objects PRIVATE cxx_std_20)
target_compile_options(microreg_two_objects PRIVATE ${microreg_warnings})
target_link_libraries(microreg_two_objects PRIVATE ${CMAKE_DL_LIBS})
add_test(NAME two_objects COMMAND microreg_two_objects $<TARGET_FILE:microreg_object_a>
                                  $<TARGET_FILE:microreg_object_b>)
set_tests_properties(two_objects PROPERTIES FAIL_REGULAR_EXPRESSION "Warning;Overriding")

add_subdirectory(compile_fail)
add_subdirectory(headers)

get_target_property(libtorch_includes microreg::libtorch INTERFACE_INCLUDE_DIRECTORIES)
if(NOT libtorch_includes)
  set(libtorch_includes "${TORCH_INCLUDE_DIRS}")
endif()
foreach(mode IN ITEMS installed fetched header_only compiled)
  add_test(
    NAME consumer.${mode}
    COMMAND
      "${CMAKE_COMMAND}" "-DMODE=${mode}" "-DBUILD_DIR=${PROJECT_BINARY_DIR}" "-DSOURCE_DIR=${PROJECT_SOURCE_DIR}"
      "-DWORK_DIR=${CMAKE_CURRENT_BINARY_DIR}/consumer_${mode}" "-DTORCH_PREFIX=${TORCH_INSTALL_PREFIX}"
      "-DGENERATOR=${CMAKE_GENERATOR}" "-DCXX=${CMAKE_CXX_COMPILER}" "-DCXX_FLAGS=${CMAKE_CXX_FLAGS}"
      "-DINCLUDES=${libtorch_includes}" -P "${CMAKE_CURRENT_SOURCE_DIR}/consumer/run.cmake")
  set_tests_properties(consumer.${mode} PROPERTIES COST 500)
endforeach()
