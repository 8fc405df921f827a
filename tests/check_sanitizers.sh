#!/usr/bin/env bash
# Builds and runs the tests under sanitizers, by clang, which compiles this in a third of GCC's time. LibTorch is not
# instrumented, so what is found is in our code, in LibTorch's headers, or at their border.
#     tests/check_sanitizers.sh            both
#     tests/check_sanitizers.sh address    the whole test suite under address and undefined behaviour
#     tests/check_sanitizers.sh thread     the tests with threads under the thread sanitizer
#     tests/check_sanitizers.sh threads-alone   of those the files that are about threads, and no others
# Leaks are not looked for: what LibTorch keeps until the process ends is no leak, and cannot be told from one. The test
# `repeated_steps` watches for growth instead, in an ordinary build.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

address() {
  export ASAN_OPTIONS="detect_leaks=0:strict_string_checks=1:detect_stack_use_after_return=1"
  export UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1"
  microreg_build
  # Freed memory is kept for a while here, so that nothing can be said of growth: one case is left out.
  ctest --test-dir "$microreg_build_dir" --output-on-failure --no-tests=error --parallel "$microreg_jobs" \
    --exclude-regex '^repeated_steps$'
  OMP_NUM_THREADS=1 "$microreg_build_dir/tests/microreg_tests" '[repeated]~thousands of steps leave memory flat'
}

threads_alone() {
  export TSAN_OPTIONS="halt_on_error=1 ignore_noninstrumented_modules=1 suppressions=$root/tests/tsan.supp"
  microreg_build microreg_thread_tests
  # The barriers of OpenMP's runtime, which is not instrumented, are not seen: no loops on its threads here.
  OMP_NUM_THREADS=1 "$microreg_build_dir/tests/microreg_thread_tests" '~[parallel]'
}

# Not the two shared objects of `two_objects`: what their threads exchange lies in LibTorch's dispatcher, whose mutex is not
# seen.
thread() {
  threads_alone
  microreg_build microreg_more_thread_tests
  OMP_NUM_THREADS=1 "$microreg_build_dir/tests/microreg_more_thread_tests" '[threads]'
}

check() (
  microreg_preset="$2"
  # The benchmarks' library is not instrumented, and their programs are no tests.
  export MICROREG_CONFIGURE_OPTIONS="${MICROREG_CONFIGURE_OPTIONS:-} -DMICROREG_BUILD_BENCHMARKS=OFF"
  source "$root/cmake/bootstrap.sh"
  microreg_require clang-19=clang++-19 libclang-rt-19-dev
  microreg_bootstrap
  "$1"
)

case "${1:-both}" in
  address) check address asan ;;
  thread) check thread tsan ;;
  threads-alone) check threads_alone tsan ;;
  both)
    check address asan
    check thread tsan
    ;;
  *)
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    [ "$1" = -h ] || [ "$1" = --help ]
    ;;
esac
