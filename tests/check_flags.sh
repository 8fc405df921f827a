#!/usr/bin/env bash
# Builds tests/flags/main.cpp, header-only, with compiler flags that users have, by g++ and by clang, and runs it:
#     tests/check_flags.sh              each flag alone, with both compilers
#     tests/check_flags.sh --together   all but -O0 in one program, with both compilers
#     tests/check_flags.sh COMPILER     one compiler
# Environment: CMAKE_PREFIX_PATH, as for tests/run_tests.sh.
set -euo pipefail
together=""
case "${1:-}" in
  -h | --help)
    sed -n '2,6s/^# \{0,1\}//p' "$0"
    exit
    ;;
  --together)
    together=yes
    shift
    ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/../cmake/bootstrap.sh"
cd "$microreg_root"
[ $# -gt 0 ] || set -- g++ clang++-19
for compiler in "$@"; do
  case "$compiler" in
    clang++-19) microreg_require clang-19=clang++-19 libomp-19-dev ;;
    *) microreg_require "$compiler=$compiler" ;;
  esac
done
microreg_find_torch
torch=""
IFS=':;' read -r -a prefixes <<<"${microreg_torch_prefix:-}:${CMAKE_PREFIX_PATH:-}"
for prefix in "${prefixes[@]}"; do
  for root in "$prefix" "$prefix/../.."; do # PREFIX/share/cmake is what Python says
    if [ -z "$torch" ] && [ -e "$root/include/torch/csrc/api/include/torch/version.h" ]; then
      torch="$(cd "$root" && pwd -P)"
    fi
  done
done
[ -n "$torch" ] || microreg_fail "LibTorch was not found in CMAKE_PREFIX_PATH"

out=build/flags
mkdir -p "$out"
status=0

# check COMPILER FLAG...
check() {
  local compiler="$1" name log
  shift
  name="$(basename "$compiler")$(printf '%s' "$@" | tr -c 'A-Za-z0-9_\n' -)"
  log="$out/$name.log"
  if "$compiler" -std=c++20 -Iinclude -isystem "$torch/include" -isystem "$torch/include/torch/csrc/api/include" \
    "$@" tests/flags/main.cpp -o "$out/$name" "-L$torch/lib" "-Wl,-rpath,$torch/lib" -ltorch_cpu -lc10 \
    -Wl,--allow-shlib-undefined >"$log" 2>&1 && OMP_NUM_THREADS=2 timeout 300 "$out/$name" >>"$log" 2>&1 &&
    ! grep -q 'RecordFunction' "$log"; then # LibTorch swallows what goes wrong in a watch on its operations, and logs it
    echo "$compiler $*: $(tail -n 1 "$log")"
  else
    echo "$compiler $*: FAILED, see $log"
    grep -E 'error|not so|warning|RecordFunction' "$log" | head -n 20 || tail -n 20 "$log"
    status=1
  fi
  rm -f "$out/$name"
}

for compiler in "$@"; do
  openmp=-fno-openmp
  [[ "$compiler" != *clang* ]] || openmp=-fopenmp # brings a second runtime beside LibTorch's
  if [ -n "$together" ]; then
    check "$compiler" -O1 -ffast-math -flto -fvisibility=hidden -D_GLIBCXX_ASSERTIONS "$openmp"
  else
    check "$compiler" -O0
    check "$compiler" -O2 -ffast-math
    check "$compiler" -O1 -fno-openmp
    check "$compiler" -O1 -fopenmp
    check "$compiler" -O1 -fvisibility=hidden -fvisibility-inlines-hidden
    check "$compiler" -O1 -D_GLIBCXX_ASSERTIONS
    check "$compiler" -O1 -flto
  fi
done
exit "$status"
