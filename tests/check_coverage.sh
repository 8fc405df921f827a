#!/usr/bin/env bash
# Which share of the lines of include/ the tests run: builds microreg_tests by the preset coverage, runs it, prints a
# table and the sum, and fails below 95 %. The lines that are not run stand in build/coverage/lines.txt.
set -euo pipefail
case "${1:-}" in
  -h | --help)
    sed -n '2,3s/^# \{0,1\}//p' "$0"
    exit
    ;;
esac
microreg_preset=coverage
export MICROREG_CONFIGURE_OPTIONS="${MICROREG_CONFIGURE_OPTIONS:-} -DMICROREG_BUILD_EXAMPLES=OFF -DMICROREG_BUILD_BENCHMARKS=OFF"
source "$(dirname "${BASH_SOURCE[0]}")/../cmake/bootstrap.sh"

microreg_require clang-19=clang++-19 llvm-19=llvm-cov-19 libclang-rt-19-dev
microreg_bootstrap
microreg_build microreg_tests
tests="$microreg_build_dir/tests/microreg_tests" counts="$microreg_build_dir/counts"
LLVM_PROFILE_FILE="$counts.raw" OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive "$tests" | tail -n 3
llvm-profdata-19 merge -sparse "$counts.raw" -o "$counts"

# A line of a template is run if it is in one of its instances.
llvm-cov-19 export "$tests" -format=lcov -instr-profile="$counts" "$microreg_root/include" |
  awk -F '[:,]' -v root="$microreg_root/" -v lines="$microreg_build_dir/lines.txt" '
    $1 == "SF" { file = substr($2, length(root) + 1) }
    $1 == "DA" { all[file]++; sum++ }
    $1 == "DA" && $3 == 0 { print file ":" $2 >lines; missed[file]++; misses++ }
    END {
      for (file in all) printf "%5d of %5d lines are not run: %s\n", missed[file], all[file], file | "sort -n"
      close("sort -n")
      covered = 100 * (1 - misses / sum)
      printf "%.1f %% of %d lines of include/ are run\n", covered, sum
      exit covered < 95
    }'
