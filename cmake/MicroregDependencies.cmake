# What the headers need: LibTorch, and nothing else. It is looked for in CMAKE_PREFIX_PATH, then beside an importable
# Python torch (MICROREG_PYTHON, by default the first python3 on the PATH). The installed package config includes this
# file too: there a missing dependency is reported through microreg_NOT_FOUND_MESSAGE, as find_package() expects.

# In a project that adds microreg as a subdirectory, imported targets must be visible from the outer directories too.
set(microreg_saved_targets_global "${CMAKE_FIND_PACKAGE_TARGETS_GLOBAL}")
set(CMAKE_FIND_PACKAGE_TARGETS_GLOBAL ON)
set(microreg_missing "")

include("${CMAKE_CURRENT_LIST_DIR}/MicroregLibTorch.cmake")
if(NOT TARGET microreg::libtorch)
  microreg_add_libtorch()
  if(NOT TARGET microreg::libtorch)
    find_program(MICROREG_PYTHON NAMES python3 python DOC "A Python, best one that can import torch")
    if(MICROREG_PYTHON)
      execute_process(
        COMMAND "${MICROREG_PYTHON}" -c "import torch; print(torch.utils.cmake_prefix_path)"
        OUTPUT_VARIABLE microreg_torch_prefix
        OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
      if(microreg_torch_prefix)
        list(APPEND CMAKE_PREFIX_PATH "${microreg_torch_prefix}")
        microreg_add_libtorch()
      endif()
    endif()
  endif()
  if(NOT TARGET microreg::libtorch)
    set(microreg_missing
        "microreg needs LibTorch, which was found neither through CMAKE_PREFIX_PATH nor through Python.\n"
        "Either:  pip install torch==2.13.0\n"
        "or:      cmake -DCMAKE_PREFIX_PATH=/path/to/libtorch ...")
  endif()
endif()
set(CMAKE_FIND_PACKAGE_TARGETS_GLOBAL "${microreg_saved_targets_global}")
string(CONCAT microreg_missing ${microreg_missing})
if(microreg_missing)
  if(CMAKE_FIND_PACKAGE_NAME STREQUAL "microreg")
    set(microreg_NOT_FOUND_MESSAGE "${microreg_missing}")
  else()
    message(FATAL_ERROR "${microreg_missing}")
  endif()
endif()
