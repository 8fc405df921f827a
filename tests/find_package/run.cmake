# cmake -DBUILD_DIR=... -DWORK_DIR=... -DTORCH_PREFIX=... -DGENERATOR=... -DCXX=... -DVERSION=... -P run.cmake
# Installs the package, moves it, and configures the project beside this file against it.
function(step)
  execute_process(COMMAND ${ARGN} COMMAND_ECHO STDOUT COMMAND_ERROR_IS_FATAL ANY)
endfunction()

file(REMOVE_RECURSE "${WORK_DIR}")
file(MAKE_DIRECTORY "${WORK_DIR}")
step("${CMAKE_COMMAND}" --install "${BUILD_DIR}" --prefix "${WORK_DIR}/installed")
file(RENAME "${WORK_DIR}/installed" "${WORK_DIR}/moved")
set(arguments -S "${CMAKE_CURRENT_LIST_DIR}" -G "${GENERATOR}" "-DCMAKE_CXX_COMPILER=${CXX}" "-DVERSION=${VERSION}")
set(ENV{CMAKE_PREFIX_PATH} "${WORK_DIR}/moved:${TORCH_PREFIX}")
step("${CMAKE_COMMAND}" ${arguments} -B "${WORK_DIR}/ways")

# What stands in LibTorch 2.6's package, as far as it is read where the libraries are for CUDA.
set(old "${WORK_DIR}/libtorch")
file(WRITE "${old}/share/cmake/Torch/TorchConfig.cmake"
     "if(LINUX)\n  set(TORCH_CXX_FLAGS \"-D_GLIBCXX_USE_CXX11_ABI=0 -DANOTHER\")\nendif()\n")
foreach(library IN ITEMS torch torch_cpu torch_cuda c10)
  file(WRITE "${old}/lib/lib${library}.so" "")
endforeach()
file(MAKE_DIRECTORY "${old}/include/torch/csrc/api/include")
set(ENV{CMAKE_PREFIX_PATH} "${WORK_DIR}/moved:${old}")
step("${CMAKE_COMMAND}" ${arguments} -B "${WORK_DIR}/abi" -DABI=ON)
