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

# One object file in two modules, as two extension modules would have it, and another with headers that differ in their
# version and in the layout of what kernels and scopes share. GCC would make the variables of headers one in the process,
# and keep modules loaded that have some; clang and others do not.
set(other_version "${CMAKE_CURRENT_BINARY_DIR}/other_version")
file(GLOB_RECURSE headers CONFIGURE_DEPENDS "${microreg_include_dir}/*.hpp")
add_custom_command(
  OUTPUT "${other_version}/stamp"
  COMMAND "${CMAKE_COMMAND}" "-DFROM=${microreg_include_dir}" "-DTO=${other_version}" -P
          "${CMAKE_CURRENT_SOURCE_DIR}/two_objects/other_version.cmake"
  DEPENDS ${headers} two_objects/other_version.cmake)
add_library(microreg_object OBJECT two_objects/object.cpp)
add_library(microreg_object_of_other OBJECT two_objects/object.cpp "${other_version}/stamp")
target_include_directories(microreg_object_of_other BEFORE PRIVATE "${other_version}")
foreach(object IN ITEMS microreg_object microreg_object_of_other)
  target_link_libraries(${object} PRIVATE microreg_test_header_only)
  target_compile_options(${object} PRIVATE $<$<CXX_COMPILER_ID:GNU>:-fno-gnu-unique>)
  target_precompile_headers(${object} REUSE_FROM microreg_test_precompiled)
endforeach()
foreach(object IN ITEMS a b c other)
  add_library(microreg_object_${object} MODULE
              $<TARGET_OBJECTS:$<IF:$<STREQUAL:${object},other>,microreg_object_of_other,microreg_object>>)
  target_link_libraries(microreg_object_${object} PRIVATE microreg_test_header_only)
endforeach()
# Two plugins of one layout, so that the second one's type lies where the first one's did.
foreach(node IN ITEMS Plain Other)
  string(TOLOWER "microreg_${node}_node" target)
  add_library(${target} MODULE two_objects/node.cpp)
  target_link_libraries(${target} PRIVATE microreg_test_header_only)
  target_compile_options(${target} PRIVATE $<$<CXX_COMPILER_ID:GNU>:-fno-gnu-unique>)
endforeach()
target_compile_definitions(microreg_plain_node PRIVATE SPACE=torch)
target_compile_definitions(microreg_other_node PRIVATE SPACE=tarch)
# It includes nothing of LibTorch's or ours.
add_executable(microreg_two_objects two_objects/main.cpp)
target_compile_features(microreg_two_objects PRIVATE cxx_std_20)
target_compile_options(microreg_two_objects PRIVATE ${microreg_warnings})
target_link_libraries(microreg_two_objects PRIVATE ${CMAKE_DL_LIBS})
add_test(NAME two_objects
         COMMAND microreg_two_objects $<TARGET_FILE:microreg_object_a> $<TARGET_FILE:microreg_object_b>
                 $<TARGET_FILE:microreg_object_c> $<TARGET_FILE:microreg_plain_node> $<TARGET_FILE:microreg_other_node>)
add_test(NAME two_versions COMMAND microreg_two_objects --versions $<TARGET_FILE:microreg_object_a>
                                   $<TARGET_FILE:microreg_object_other>)
add_test(NAME two_versions.other_first COMMAND microreg_two_objects --versions $<TARGET_FILE:microreg_object_other>
                                               $<TARGET_FILE:microreg_object_a>)
set_tests_properties(two_objects two_versions two_versions.other_first PROPERTIES FAIL_REGULAR_EXPRESSION "Warning;Overriding")

# As a user's own debugging build, header-only: LibTorch's headers assert then what its releases do not keep.
add_executable(microreg_without_ndebug flags/main.cpp)
target_link_libraries(microreg_without_ndebug PRIVATE microreg::header_only)
target_compile_features(microreg_without_ndebug PRIVATE cxx_std_20)
target_compile_options(microreg_without_ndebug PRIVATE -O0 -UNDEBUG)
add_test(NAME without_ndebug COMMAND microreg_without_ndebug)
set_tests_properties(without_ndebug PROPERTIES ENVIRONMENT OMP_NUM_THREADS=2 FAIL_REGULAR_EXPRESSION "RecordFunction")

add_subdirectory(compile_fail)
add_subdirectory(headers)

add_test(
  NAME find_package
  COMMAND
    "${CMAKE_COMMAND}" "-DBUILD_DIR=${PROJECT_BINARY_DIR}" "-DWORK_DIR=${CMAKE_CURRENT_BINARY_DIR}/find_package"
    "-DTORCH_PREFIX=${TORCH_INSTALL_PREFIX}" "-DGENERATOR=${CMAKE_GENERATOR}" "-DCXX=${CMAKE_CXX_COMPILER}"
    "-DVERSION=${PROJECT_VERSION}" -P "${CMAKE_CURRENT_SOURCE_DIR}/find_package/run.cmake")

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
      "-DGENERATOR=${CMAKE_GENERATOR}" "-DCXX=${CMAKE_CXX_COMPILER}" "-DCXX_FLAGS=${CMAKE_CXX_FLAGS} ${TORCH_CXX_FLAGS}"
      "-DINCLUDES=${libtorch_includes}" -P "${CMAKE_CURRENT_SOURCE_DIR}/consumer/run.cmake")
  set_tests_properties(consumer.${mode} PROPERTIES COST 500)
endforeach()
