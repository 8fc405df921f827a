# cmake -DCOMPILER=g++ -DINCLUDES=dir;dir;.. -DWORK=dir -P check_libtorch_range.cmake
# That the headers name the versions of LibTorch that they are for: another one is an error of the preprocessor.
function(expect minor option message)
  file(WRITE "${WORK}/version.cpp" "#include <torch/version.h>\n"
                                   "#undef TORCH_VERSION_MAJOR\n#define TORCH_VERSION_MAJOR 2\n"
                                   "#undef TORCH_VERSION_MINOR\n#define TORCH_VERSION_MINOR ${minor}\n"
                                   "#include <microreg/detail/libtorch.hpp>\n")
  list(TRANSFORM INCLUDES PREPEND "-I" OUTPUT_VARIABLE folders)
  execute_process(COMMAND "${COMPILER}" -std=c++20 -E ${option} ${folders} "${WORK}/version.cpp" -o "${WORK}/version.i"
                  RESULT_VARIABLE result ERROR_VARIABLE said)
  string(FIND "${said}" "${message}" place)
  if(message STREQUAL "" AND NOT result EQUAL 0)
    message(SEND_ERROR "LibTorch 2.${minor} ${option} is refused: ${said}")
  elseif(NOT message STREQUAL "" AND (result EQUAL 0 OR place EQUAL -1))
    message(SEND_ERROR "LibTorch 2.${minor} ${option} is not refused by \"${message}\": ${said}")
  endif()
endfunction()

expect(5 "" "microreg needs LibTorch 2.6 or newer")
expect(6 "" "")
expect(15 "" "")
expect(16 "" "microreg was tested with LibTorch 2.6 to 2.15")
expect(16 -DMICROREG_ANY_LIBTORCH "")
