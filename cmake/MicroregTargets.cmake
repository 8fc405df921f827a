# The targets, from a source tree and from an installed package alike: both set microreg_include_dir and include this.
#
#   microreg::microreg     what users link to. What is no template is compiled once, in their build, so with their
#                          compiler, flags and LibTorch: microreg_compiled, built only where something links to it.
#   microreg::header_only  the headers alone; every file compiles what it uses.
#   microreg::format       the first, with what microreg/format.hpp needs: there where fmt was found before.
#
# Imported and global: a second find_package() anywhere in the project finds them made, and a library of the user's can
# be exported by its own package without microreg in it, which then finds microreg for itself.
# Header-only fmt: LibTorch's wheel carries newer fmt headers in its include folder.
if(TARGET fmt::fmt-header-only AND NOT TARGET microreg::format)
  add_library(microreg::format INTERFACE IMPORTED GLOBAL)
  target_link_libraries(microreg::format INTERFACE microreg::microreg fmt::fmt-header-only)
endif()
if(TARGET microreg::microreg)
  return()
endif()

foreach(target IN ITEMS microreg::microreg microreg::header_only)
  add_library(${target} INTERFACE IMPORTED GLOBAL)
  target_compile_features(${target} INTERFACE cxx_std_20)
  target_include_directories(${target} INTERFACE "${microreg_include_dir}")
  # A target, not ${TORCH_LIBRARIES}, whose absolute paths would be carried along.
  target_link_libraries(${target} INTERFACE microreg::libtorch)
endforeach()

# Position independent, for the user's shared libraries; optimised, also in a build type that is not.
add_library(microreg_compiled STATIC EXCLUDE_FROM_ALL "${CMAKE_CURRENT_LIST_DIR}/microreg.cpp")
target_link_libraries(microreg_compiled PRIVATE microreg::header_only)
target_compile_definitions(microreg_compiled PRIVATE MICROREG_COMPILED)
target_compile_options(microreg_compiled
                       PRIVATE $<$<NOT:$<CONFIG:Release,RelWithDebInfo,MinSizeRel>>:-O2>)
set_target_properties(microreg_compiled PROPERTIES POSITION_INDEPENDENT_CODE ON)
target_compile_definitions(microreg::microreg INTERFACE MICROREG_COMPILED)
target_link_libraries(microreg::microreg INTERFACE microreg_compiled)

# In its own build the library is checked; in another's it is not their code to check, as their -Werror would have it.
if(PROJECT_NAME STREQUAL "microreg" AND PROJECT_IS_TOP_LEVEL)
  set_target_properties(microreg::microreg microreg::header_only PROPERTIES SYSTEM OFF)
else()
  target_compile_options(microreg_compiled PRIVATE -w)
  set_target_properties(microreg_compiled PROPERTIES CXX_CLANG_TIDY "" CXX_CPPCHECK "" CXX_CPPLINT ""
                                                     CXX_INCLUDE_WHAT_YOU_USE "")
endif()
