#!/usr/bin/env bash
# Hands what libFuzzer makes to the readers of files (examples/cifar/fuzz), under address and undefined-behaviour
# sanitizers, and fails at a crash, an input that takes 10 s, or an allocation beyond 64 MB.
#     tests/fuzz_readers.sh                            every reader, a million files each
#     tests/fuzz_readers.sh --runs 10000 norms images  these, so many
# What it finds is written to build/fuzz/found; put it into examples/cifar/fuzz/corpus once it is mended, which the test
# "cifar: corpus" reads.
set -euo pipefail
runs=1000000
readers=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help)
      sed -n '2,7s/^# \{0,1\}//p' "$0"
      exit
      ;;
    --runs)
      runs="$2"
      shift
      ;;
    *) readers+=("$1") ;;
  esac
  shift
done
microreg_preset=fuzz
source "$(dirname "${BASH_SOURCE[0]}")/../cmake/bootstrap.sh"

microreg_require clang-19=clang++-19 libclang-rt-19-dev
microreg_bootstrap
microreg_build microreg_fuzz_readers
corpus="$microreg_root/examples/cifar/fuzz/corpus"
# LibTorch and CLI11 allocate thousands of blocks for a file: filling them, and keeping freed ones for long, would take
# more time than reading it.
export ASAN_OPTIONS="detect_leaks=0:malloc_context_size=0:max_malloc_fill_size=0:quarantine_size_mb=1\
:thread_local_quarantine_size_kb=64:detect_stack_use_after_return=0"
[ ${#readers[@]} -gt 0 ] || mapfile -t readers < <(ls "$corpus")
for reader in "${readers[@]}"; do
  mkdir -p "$microreg_build_dir/found" "$microreg_build_dir/corpus/$reader"
  MICROREG_READER="$reader" OMP_NUM_THREADS=1 \
    "$microreg_build_dir/examples/cifar/fuzz/microreg_fuzz_readers" -runs="$runs" -timeout=10 -malloc_limit_mb=64 \
    -rss_limit_mb=2048 -print_final_stats=1 -artifact_prefix="$microreg_build_dir/found/$reader-" \
    "$microreg_build_dir/corpus/$reader" "$corpus/$reader" 2>&1 >/dev/null | tail -n 12  # the command line prints its help
done
