# Defines microreg::libtorch, LibTorch as the headers use it, or leaves it undefined where there is no LibTorch.
#
# LibTorch's own package config needs a complete CUDA toolkit where LibTorch was built for CUDA, and stops with an error
# without one, as after `pip install torch` on a machine without nvcc. Who only calls LibTorch needs none: there the
# target is made from the headers and libraries beside that config, and the device works as far as its driver is there.

# microreg_find_libtorch(variable): the folder that holds LibTorch's include and lib, or "".
function(microreg_find_libtorch variable)
  file(TO_CMAKE_PATH "$ENV{CMAKE_PREFIX_PATH}" from_environment)
  foreach(folder IN LISTS Torch_DIR CMAKE_PREFIX_PATH from_environment)
    foreach(suffix IN ITEMS "" "/Torch" "/share/cmake/Torch")
      if(EXISTS "${folder}${suffix}/TorchConfig.cmake")
        get_filename_component(prefix "${folder}${suffix}/../../.." ABSOLUTE)
        set(${variable} "${prefix}" PARENT_SCOPE)
        return()
      endif()
    endforeach()
  endforeach()
  set(${variable} "" PARENT_SCOPE)
endfunction()

# A macro, for the variables that find_package(Torch) sets.
macro(microreg_add_libtorch)
  microreg_find_libtorch(microreg_libtorch_root)
  if(NOT TARGET torch AND EXISTS "${microreg_libtorch_root}/lib/libtorch_cuda.so")
    set(TORCH_INSTALL_PREFIX "${microreg_libtorch_root}")
    add_library(microreg::libtorch INTERFACE IMPORTED GLOBAL)
    target_include_directories(
      microreg::libtorch INTERFACE "${TORCH_INSTALL_PREFIX}/include"
                                   "${TORCH_INSTALL_PREFIX}/include/torch/csrc/api/include")
    # Up to 2.6 a wheel was compiled for the old ABI of libstdc++, and so must be what links to it.
    file(STRINGS "${TORCH_INSTALL_PREFIX}/share/cmake/Torch/TorchConfig.cmake" microreg_torch_flags
         REGEX "^ *set\\(TORCH_CXX_FLAGS \"")
    if(microreg_torch_flags MATCHES "\"(.*)\"")
      set(TORCH_CXX_FLAGS "${CMAKE_MATCH_1}")
      separate_arguments(microreg_torch_flags UNIX_COMMAND "${TORCH_CXX_FLAGS}")
      target_compile_options(microreg::libtorch INTERFACE ${microreg_torch_flags})
    endif()
    # Nothing refers to a symbol of libtorch.so: it holds only the need for libtorch_cuda.so.
    target_link_libraries(
      microreg::libtorch
      INTERFACE "-Wl,--push-state,--no-as-needed" "${TORCH_INSTALL_PREFIX}/lib/libtorch.so" "-Wl,--pop-state"
                "${TORCH_INSTALL_PREFIX}/lib/libtorch_cpu.so" "${TORCH_INSTALL_PREFIX}/lib/libc10.so")
    # The CUDA libraries of a wheel are found by the loader, relative to libtorch_cuda.so, but not by the linker.
    target_link_options(microreg::libtorch INTERFACE "-Wl,--allow-shlib-undefined")
  else()
    find_package(Torch QUIET)
    if(TARGET torch)
      add_library(microreg::libtorch INTERFACE IMPORTED GLOBAL)
      target_link_libraries(microreg::libtorch INTERFACE torch)
    endif()
  endif()
endmacro()
