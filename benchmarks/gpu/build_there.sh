#!/usr/bin/env bash
# Builds what benchmarks/gpu/prepare.sh would have brought, where its programs do not load (another C++ library, another
# build of LibTorch): the tests of what a device computes, the benchmark and the trainer, by a compiler and Python's torch
# alone.
#
#     benchmarks/gpu/build_there.sh HEADERS OUTPUT_FOLDER [PROGRAM...]
#
# HEADERS has those of Catch2, CLI11 and nlohmann-json. Programs, all by default: microreg_tests penalty_overhead
# microreg_cifar. Environment: CXX, PYTHON, and MICROREG_JOBS, parallel jobs.
set -euo pipefail
case "${1:---help}" in
  -h | --help)
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit
    ;;
esac
headers="$(cd "$1" && pwd)"
mkdir -p "$2"
out="$(cd "$2" && pwd)"
shift 2
programs=("$@")
[ "${#programs[@]}" -gt 0 ] || programs=(microreg_tests penalty_overhead microreg_cifar)
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
compiler="${CXX:-g++}"
command -v "$compiler" >/dev/null || { echo "error: there is no $compiler here" >&2; exit 1; }
torch="$("${PYTHON:-python3}" -c 'import os, torch; print(torch.__path__[0])')"

flags=(-std=c++20 -O2 -DNDEBUG -DMICROREG_COMPILED -DFMT_HEADER_ONLY "-DMICROREG_TESTS_DIR=\"$root/tests\"" -fopenmp
  "-I$root/include" "-I$root" "-I$root/tests" "-I$root/examples/cifar" "-isystem$headers" "-isystem$torch/include"
  "-isystem$torch/include/torch/csrc/api/include")
libraries=(-ltorch -ltorch_cpu -lc10)
for cuda in "${CUDA_HOME:-/usr/local/cuda}/include" "$torch/../nvidia/cu13/include"; do
  if [ -e "$torch/lib/libtorch_cuda.so" ] && [ -e "$cuda/crt/host_defines.h" ]; then
    flags+=(-DMICROREG_WITH_CUDA "-isystem$cuda")
    libraries+=(-ltorch_cuda -lc10_cuda)
    break
  fi
done
# What pip's wheel was compiled with, where that is not the compiler's own choice.
abi="$("${PYTHON:-python3}" -c 'import torch; print(int(torch._C._GLIBCXX_USE_CXX11_ABI))')"
flags+=("-D_GLIBCXX_USE_CXX11_ABI=$abi")

# The sources of a program, each from the root.
sources() {
  echo cmake/microreg.cpp
  case "$1" in
    microreg_tests) printf 'tests/%s.cpp\n' main on_device stand_in_gpu test_cuda test_cuda_numbers test_half ;;
    penalty_overhead)
      (cd "$root" && ls benchmarks/*.cpp examples/cifar/model*.cpp) | grep -v '_study\.cpp$'
      ;;
    microreg_cifar) (cd "$root" && ls examples/cifar/*.cpp) ;;
    *) echo "error: there is no program $1" >&2; return 1 ;;
  esac
}

objects_folder="$(mktemp -d)"
trap 'rm -rf "$objects_folder"' EXIT
object() { echo "$objects_folder/$(echo "$1" | tr / _).o"; }
all="$(for program in "${programs[@]}"; do sources "$program"; done | sort -u)"
export -f object
export objects_folder
failed=""
cd "$root"
echo "$all" | xargs -P "${MICROREG_JOBS:-$(nproc)}" -I SOURCE bash -c \
  'source="$1"; shift; "$@" -c "$source" -o "$(object "$source")"' _ SOURCE "$compiler" "${flags[@]}" || failed=1
for program in "${programs[@]}"; do
  objects=()
  while read -r source; do objects+=("$(object "$source")"); done < <(sources "$program")
  "$compiler" -fopenmp -rdynamic "${objects[@]}" -o "$out/$program" "-L$torch/lib" "-Wl,-rpath,$torch/lib" -Wl,--no-as-needed \
    -Wl,--allow-shlib-undefined \
    "${libraries[@]}" -ldl -lpthread || failed=1
done
[ -z "$failed" ] || { echo "error: not all programs could be built" >&2; exit 1; }
