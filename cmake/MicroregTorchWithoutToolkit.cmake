# LibTorch's own package config stops with an error where LibTorch was built for CUDA and the CUDA toolkit is missing,
# as after `pip install torch` on a machine without nvcc. Who only calls LibTorch needs no toolkit: this defines the
# target torch from the headers and libraries beside that config. The device works as far as its driver is there.

# microreg_find_torch_prefix(variable): the folder that holds LibTorch's include and lib, or "".
function(microreg_find_torch_prefix variable)
  file(TO_CMAKE_PATH "$ENV{CMAKE_PREFIX_PATH}" from_environment)
  set(${variable} "" PARENT_SCOPE)
  foreach(folder IN LISTS Torch_DIR CMAKE_PREFIX_PATH from_environment)
    foreach(suffix IN ITEMS "" "/Torch" "/share/cmake/Torch")
      if(EXISTS "${folder}${suffix}/TorchConfig.cmake")
        get_filename_component(prefix "${folder}${suffix}/../../.." ABSOLUTE)
        set(${variable} "${prefix}" PARENT_SCOPE)
        return()
      endif()
    endforeach()
  endforeach()
endfunction()

# Defines the target torch, TORCH_INSTALL_PREFIX and Torch_FOUND if LibTorch is such a one; otherwise does nothing.
macro(microreg_torch_without_toolkit)
  microreg_find_torch_prefix(microreg_torch_root)
  if(microreg_torch_root AND EXISTS "${microreg_torch_root}/lib/libtorch_cuda.so")
    find_package(CUDAToolkit QUIET)
    if(NOT TARGET CUDA::cudart)  # also where there is a compiler but not the rest
      message(STATUS "LibTorch for CUDA without the CUDA toolkit: using ${microreg_torch_root} without its CMake package")
      set(TORCH_INSTALL_PREFIX "${microreg_torch_root}")
      add_library(torch INTERFACE IMPORTED GLOBAL)
      target_include_directories(torch INTERFACE "${microreg_torch_root}/include"
                                                 "${microreg_torch_root}/include/torch/csrc/api/include")
      # libtorch.so holds nothing but the need for libtorch_cuda.so, whose own libraries the loader finds beside it.
      target_link_libraries(
        torch
        INTERFACE "-Wl,--no-as-needed,${microreg_torch_root}/lib/libtorch.so,--as-needed"
                  "${microreg_torch_root}/lib/libtorch_cpu.so" "${microreg_torch_root}/lib/libc10.so")
      target_link_options(torch INTERFACE "-Wl,--allow-shlib-undefined")
      set(Torch_FOUND TRUE)
    endif()
  endif()
endmacro()
