# What the headers need: LibTorch and OpenMP. LibTorch is looked for in CMAKE_PREFIX_PATH, then beside an importable
# Python torch. The installed package config includes this file too.
include(CMakeFindDependencyMacro)

if(NOT TARGET torch)
  find_package(Torch QUIET)
  if(NOT Torch_FOUND)
    find_program(MICROREG_PYTHON NAMES python3 python)
    if(MICROREG_PYTHON)
      execute_process(
        COMMAND "${MICROREG_PYTHON}" -c "import torch; print(torch.utils.cmake_prefix_path)"
        OUTPUT_VARIABLE microreg_torch_prefix
        OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
      if(microreg_torch_prefix)
        list(APPEND CMAKE_PREFIX_PATH "${microreg_torch_prefix}")
      endif()
    endif()
    find_package(Torch QUIET)
  endif()
  if(NOT Torch_FOUND)
    message(
      FATAL_ERROR
        "microreg needs LibTorch, which was found neither through CMAKE_PREFIX_PATH nor through Python.\n"
        "Either:  pip install torch==2.13.0\n"
        "or:      cmake -DCMAKE_PREFIX_PATH=/path/to/libtorch ...")
  endif()
endif()
if(NOT OpenMP_CXX_FOUND)
  find_dependency(OpenMP COMPONENTS CXX)
endif()
