# Runs `program` --quick with one round and checks the records that it leaves in `file`: the fields, and what they must
# hold whatever the machine does.
cmake_minimum_required(VERSION 3.25)

file(REMOVE "${file}")
execute_process(COMMAND "${program}" --quick --rounds 1 --json "${file}" RESULT_VARIABLE result)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "${program} --quick ended with ${result}")
endif()
file(READ "${file}" rows)
string(JSON count LENGTH "${rows}")

set(seen "")
math(EXPR last "${count} - 1")
foreach(index RANGE ${last})
  foreach(field IN ITEMS model batch_norm layout micro_batch penalty estimator fused threads device plain_ms ratio
                         peak_memory_ratio relative_error)
    string(JSON ${field} GET "${rows}" ${index} ${field})  # an error if it is not there
  endforeach()
  if(NOT model STREQUAL "resnet18_w16" OR NOT batch_norm OR NOT penalty STREQUAL "gradient_norm")
    message(SEND_ERROR "row ${index} is about ${model}, ${penalty}")
  endif()
  if(NOT plain_ms GREATER 0 OR NOT ratio GREATER 0 OR NOT threads GREATER 0)
    message(SEND_ERROR "row ${index}: ${plain_ms} ms, ratio ${ratio}, ${threads} threads")
  endif()
  # A tenth of a percent: far above rounding, far below any mistake.
  if(estimator STREQUAL "exact" AND NOT relative_error LESS 0.001)
    message(SEND_ERROR "row ${index}: exact is off by ${relative_error}")
  endif()
  list(APPEND seen "${layout} ${estimator} ${fused}")
endforeach()
foreach(row IN ITEMS "nchw exact ON" "nchw exact OFF" "channels_last exact ON" "channels_last exact OFF")
  if(NOT row IN_LIST seen)
    message(SEND_ERROR "there is no row ${row}, only ${seen}")
  endif()
endforeach()
