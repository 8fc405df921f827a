#!/usr/bin/env bash
# Builds and runs tests with other versions of LibTorch, as PyPI has them, on the CPU, and prints a table:
#     tests/check_versions.sh [VERSION...]           the oracle's, the kernels', the gates' and the estimators' tests, and
#                                                    the CIFAR trainer
#     tests/check_versions.sh --quick [VERSION...]   the oracle's alone, header-only, in one program; the versions at a time
#     tests/check_versions.sh --syntax [VERSION...]  in addition, other tests, examples and benchmarks are parsed
#     tests/check_versions.sh --all [VERSION...]     all tests, the trainer's too, and the trainer
#     tests/check_versions.sh --faults [VERSION...]  which of LibTorch's own faults that docs/libtorch-bugs.md lists are there
# Without a version: the oldest and the newest that the library is for. A version is downloaded once, into build/versions,
# where what is not needed here (all of CUDA but 13 MB) is left out. Exits with 77 if all that was wrong is that a version
# could not be downloaded. Environment: CXX, MICROREG_JOBS, MICROREG_VERSIONS_DIR.
set -euo pipefail
mode=full
case "${1:-}" in
  -h | --help)
    sed -n '2,11s/^# \{0,1\}//p' "$0"
    exit
    ;;
  --quick | --syntax | --all | --faults)
    mode="${1#--}"
    shift
    ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/../cmake/bootstrap.sh"
cd "$microreg_root"
microreg_require g++=c++ catch2 libfmt-dev libcli11-dev nlohmann-json3-dev libbenchmark-dev libgloo-dev binutils=readelf
[ $# -gt 0 ] || set -- 2.6.0 2.15.0
compiler="${CXX:-g++}"
cache="${MICROREG_VERSIONS_DIR:-build/versions}"
mkdir -p "$cache"
cache="$(cd "$cache" && pwd -P)"

python=python3
if ! python3 -m pip --version >/dev/null 2>&1; then
  python="$cache/venv/bin/python3"
  [ -x "$python" ] || python3 -m venv "$cache/venv" || microreg_fail "there is no pip; install python3-venv or python3-pip"
fi

download_limit=1800 # seconds
[ "$mode" != quick ] || download_limit=100
platforms=()  # pip asks for each by name
for tag in manylinux1 manylinux2014 manylinux_2_{17,24,25,26,27,28,31,34}; do
  platforms+=(--platform "${tag}_$(uname -m)")
done

# download FOLDER REQUIREMENT PART...: unpacks of a wheel the files whose names match one of the parts. The Python that a
# wheel is for does not matter here: nothing of it is run.
download() {
  local folder="$1" requirement="$2" wheels="$1/wheels"
  shift 2
  rm -rf "$wheels"
  PIP_CONFIG_FILE=/dev/null timeout "$download_limit" "$python" -m pip download --quiet --disable-pip-version-check \
    --no-input --no-deps --no-cache-dir --retries 1 --timeout 15 --only-binary=:all: --python-version 3.11 \
    "${platforms[@]}" -d "$wheels" "$requirement" || return 1
  "$python" - "$folder" "$wheels"/*.whl "$@" <<'END' || return 1
import fnmatch, sys, zipfile
folder, wheel, *parts = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive:
    for name in archive.namelist():
        if any(fnmatch.fnmatch(name, part) for part in parts):
            archive.extract(name, folder)
END
  rm -rf "$wheels"
}

# fetch VERSION: LibTorch's headers and its library for the CPU, and what that needs of CUDA to be loaded.
fetch() {
  local folder="$cache/$1" cuda
  [ -e "$folder/complete" ] && return
  microreg_say "Downloading LibTorch $1" >&2
  if [ ! -e "$folder/torch/version.py" ]; then
    rm -rf "$folder"
    mkdir -p "$folder"
    download "$folder" "torch==$1" 'torch/include/*' 'torch/share/cmake/Torch/*' torch/version.py \
      'torch/lib/libtorch_cpu.so' 'torch/lib/libc10.so' 'torch/lib/libgomp*' || return 1
  fi
  cuda="$(readelf -d "$folder/torch/lib/libtorch_cpu.so" | sed -n 's/.*libcudart\.so\.\([0-9]*\).*/\1/p')"
  case "$cuda" in
    "") ;;
    12) for part in runtime cupti; do download "$folder" "nvidia-cuda-$part-cu12" 'nvidia/*.so.*' || return 1; done ;;
    *) for part in runtime cupti; do download "$folder" "nvidia-cuda-$part==$cuda.*" 'nvidia/*.so.*' || return 1; done ;;
  esac
  touch "$folder/complete"
}


# What is built: the tests of these files, those that tests/CMakeLists.txt groups together compiled as one. The oracle's
# go with what all of them need.
tests=(on_device stand_in_gpu test_oracle)
[ "$mode" != all ] || mapfile -t tests < <(cd tests && printf '%s\n' on_device.cpp stand_in_gpu.cpp test_*.cpp | sed 's/\.cpp$//')
[ "$mode" = quick ] || [ "$mode" = all ] ||
  tests+=(test_estimator test_finite_differences test_fused_{activations,batch_norm,convolution,group_norm,max_pool,normalisation} \
    test_fused_{rows,scope,transformer,transforms} test_gates{,_differences,_operations,_pooling,_unseen} test_parallel)

# groups_of FILE...: the group of each file (or its own name), a tab, and the file.
groups_of() {
  local file group
  for file in "$@"; do
    [ "$file" != on_device ] || group=test_oracle
    [ "$file" = on_device ] || group="$(sed -n "s/^group(\([a-z_]*\) .*\<$file\.cpp\>.*/\1/p" tests/CMakeLists.txt)"
    printf '%s\t%s\n' "${group:-$file}" "$file"
  done
}

# compile OBJECT SOURCE FLAG...: in the background; what the compiler says goes to OBJECT.log.
compile() {
  local object="$1" source="$2"
  shift 2
  while [ "$(jobs -rp | wc -l)" -ge "$microreg_jobs" ]; do wait -n || true; done
  rm -f "$object"
  "$compiler" "$@" -c "$source" -o "$object" >"$object.log" 2>&1 &
}

# together NAME SOURCE...: compiles them as one file; within check.
together() {
  printf '#include "%s"\n' "${@:2}" >"$out/$1.cpp"
  compile "$out/$1.o" "$out/$1.cpp" "${flags[@]}"
}

# count_seconds: sets seconds to the CPU time of all that this shell has started and that has ended; within check.
count_seconds() {
  times >"$folder/times"
  seconds="$(awk 'NR == 2 { gsub(/[ms]/, " "); split($0, t, " "); printf "%d", 60 * t[1] + t[2] + 60 * t[3] + t[4] }' \
    "$folder/times")"
}

# flags_of VERSION: sets what a file is compiled with, and abi: old or new, of the standard library, as LibTorch's config
# says that its own code was compiled for; within check and faults.
flags_of() {
  local folder="$cache/$1"
  read -r -a extra < <(sed -n 's/^ *set(TORCH_CXX_FLAGS "\(.*\)").*/\1/p' "$folder/torch/share/cmake/Torch/TorchConfig.cmake"
    echo)
  abi=new
  [[ "${extra[*]}" != *_GLIBCXX_USE_CXX11_ABI=0* ]] || abi=old
  flags=("${extra[@]}" -std=c++20 -O0 -DNDEBUG -DFMT_HEADER_ONLY=1 "-DMICROREG_TESTS_DIR=\"$PWD/tests\""
    -Iinclude -I. -Itests -isystem "$folder/torch/include" -isystem "$folder/torch/include/torch/csrc/api/include"
    -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror)
  libraries=("-L$folder/torch/lib" "-Wl,-rpath,$folder/torch/lib" -ltorch_cpu -lc10 -Wl,--allow-shlib-undefined)
}

# faults VERSION: writes which of LibTorch's faults it has into the tables.
faults() {
  local folder="$cache/$1" abi
  local -a extra flags libraries
  fetch "$1" || return 77
  flags_of "$1"
  "$compiler" "${flags[@]}" tests/differential/libtorch_faults.cpp -o "$folder/faults" "${libraries[@]}" &&
    ONEDNN_MAX_CPU_ISA=AVX2 "$folder/faults" 2>/dev/null >"$tables/$1"
}

# check VERSION: prints a row of the table; fails unless everything compiled and all tests passed, with 77 without LibTorch.
check() {
  local version="$1" folder="$cache/$1" seconds begin abi remarks="" problem=""
  mkdir -p "$folder"
  count_seconds
  begin="$seconds"
  row() { # compiled, passed, assertions, remarks
    count_seconds
    printf '| %s | %s | %s | %s | %s | %s s | %s |\n' "$version" "$abi" "$1" "$2" "$3" $((seconds - begin)) "$4" | tee "$tables/$version"
  }
  abi="?"
  fetch "$version" || { row no - - "could not be downloaded"; return 77; }

  local -a extra flags libraries objects=() trainer=() trainer_tests=() files
  flags_of "$version"
  local out="$folder/$mode" object source group file
  mkdir -p "$out"
  [[ "$mode" != @(all|syntax) ]] || flags+=(-DUSE_DISTRIBUTED -DUSE_C10D_GLOO -DMICROREG_WITH_GLOO)
  # Catch2's main function knows nothing of LibTorch: one for each ABI will do.
  local main="$cache/main-$(basename "$compiler")-$abi.o"
  [ "$mode" != quick ] || main="$out/main.o" # for this version alone: another may be at work on the common one
  [ -e "$main" ] || compile "$main" tests/main.cpp "${extra[@]}" -std=c++20 -O0
  objects+=("$main")
  if [ "$mode" != quick ]; then
    printf '#include <microreg/compiled.hpp>\n' >"$out/library.cpp"
    compile "$out/library.o" "$out/library.cpp" "${flags[@]}" -DMICROREG_COMPILED
    objects+=("$out/library.o")
    # Once: clang refuses a precompiled header, which a compiler cache may hand out, that is not of the same second.
    [ -e "$out/all.hpp" ] || printf '#include <torch/torch.h>\n#include <fmt/format.h>\n#include "catch.hpp"\n' >"$out/all.hpp"
    "$compiler" "${flags[@]}" -x c++-header "$out/all.hpp" -o "$out/all.hpp.${pch_suffix}" >"$out/all.log" 2>&1 || true
    flags+=(-DMICROREG_COMPILED -include "$out/all.hpp")
  fi
  while read -r group; do
    read -r -a files < <(groups_of "${tests[@]}" | awk -F '\t' -v group="$group" '$1 == group { print $2 ".cpp" }' | xargs)
    together "all_of_$group" "${files[@]}" # no name of a file that it includes
    objects+=("$out/all_of_$group.o")
  done < <(groups_of "${tests[@]}" | cut -f 1 | sort -u)
  if [ "$mode" != quick ]; then
    flags+=(-Iexamples/cifar)
    together trainer_networks examples/cifar/model*.cpp
    together trainer_first examples/cifar/[a-e]*.cpp
    together trainer_second examples/cifar/{methods,[n-z]*}.cpp
    together trainer_main examples/cifar/main.cpp
    trainer=("$out"/trainer_{networks,first,second,main}.o "$out/library.o")
    if [ "$mode" = all ]; then
      flags+=(-Iexamples/cifar/tests)
      together trainer_tests examples/cifar/tests/test_*.cpp
      trainer_tests=("$out"/trainer_{networks,first,second,tests}.o "$out/library.o" "$main")
    fi
  fi

  local -a parsed=()
  if [ "$mode" = syntax ]; then
    for source in {tests,tests/differential,examples/cifar/tests}/*.cpp {examples,benchmarks}/*.cpp; do
      file="$(basename "$source" .cpp)"
      [[ " ${tests[*]} " != *" $file "* ]] || continue
      parsed+=("$out/parsed/${source//\//.}")
      mkdir -p "$out/parsed"
      compile "${parsed[-1]}" "$source" "${flags[@]}" -fsyntax-only -Ibenchmarks -Iexamples/cifar/tests
    done
  fi
  wait

  for object in "${objects[@]}" "${trainer[@]}" "${trainer_tests[@]}"; do
    [ -e "$object" ] || problem+=" $(basename "$object" .o)"
  done
  for object in "${parsed[@]}"; do
    ! grep -q 'error:' "$object.log" || problem+=" $(basename "$object")"
  done
  if [ -n "$problem" ]; then
    row no - - "not compiled:$problem; see $cache/$version/$mode/*.log"
    return 1
  fi
  if ! { "$compiler" "${objects[@]}" -o "$out/tests" "${libraries[@]}" &&
    { [ "$mode" = quick ] || "$compiler" "${trainer[@]}" -o "$out/trainer" "${libraries[@]}"; } &&
    { [ "$mode" != all ] || "$compiler" "${trainer_tests[@]}" -o "$out/trainer_tests" "${libraries[@]}"; }; } \
    >"$out/link.log" 2>&1; then
    row yes - - "not linked; see $cache/$version/$mode/link.log"
    return 1
  fi

  local status=0 summary left
  OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive "$out/tests" --warn NoTests >"$out/tests.log" 2>&1 || status=$?
  left="$(grep -o 'microreg leaves [^ ]*' "$out/tests.log" | sort -u | wc -l)"
  [ "$left" = 0 ] || remarks+="$left operations left to LibTorch; "
  [ "$mode" != syntax ] || remarks+="${#parsed[@]} more files parsed; "
  summary="$(sed -n 's/^All tests passed (\([0-9]*\) assertions in \([0-9]*\) test cases)/\2 of \2|\1/p' "$out/tests.log")"
  if [ "$status" != 0 ] || [ -z "$summary" ]; then
    summary="$(sed -n 's/^test cases: *\([0-9]*\) | *\([0-9]*\) passed.*/\2 of \1|-/p' "$out/tests.log")"
    row yes "${summary%|*}" - "failed (status $status); see $cache/$version/$mode/tests.log"
    return 1
  fi
  if [ "$mode" != quick ]; then
    rm -rf "$out/trained"
    if ! OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive "$out/trainer" --data synthetic --model cnn --image-size 16 --train-size 64 \
      --validation-size 32 --test-size 32 --batch-size 32 --micro-batch-size 16 --steps 3 --method gradient-norm --strength 0.03 \
      --output "$out/trained" >"$out/trainer.log" 2>&1; then
      row yes "${summary%|*}" "${summary#*|}" "the trainer failed; see $cache/$version/$mode/trainer.log"
      return 1
    fi
    remarks+="trainer ran; "
  fi
  if [ "$mode" = all ]; then
    if ! OMP_NUM_THREADS=1 "$out/trainer_tests" >"$out/trainer_tests.log" 2>&1; then
      row yes "${summary%|*}" "${summary#*|}" "the trainer's tests failed; see $cache/$version/$mode/trainer_tests.log"
      return 1
    fi
    remarks+="$(sed -n 's/^All tests passed (\([0-9]*\) assertions in \([0-9]*\) test cases)/\2 more of the trainer passed/p' \
      "$out/trainer_tests.log"); "
  fi
  row yes "${summary%|*}" "${summary#*|}" "${remarks%; }"
}

case "$("$compiler" --version | head -n 1)" in *clang*) pch_suffix=pch ;; *) pch_suffix=gch ;; esac
microreg_count_jobs
tables="$(mktemp -d)"
trap 'rm -rf "$tables"' EXIT
status=0
# A version that fails is worse than one that is not there.
take() {
  local this=0
  "$@" || this=$?
  [ "$this" = 0 ] || [ "$status" = 1 ] || status=$((this == 77 ? 77 : 1))
}
if [ "$mode" = faults ]; then
  for version in "$@"; do take faults "$version"; done
  there=()
  for version in "$@"; do [ ! -s "$tables/$version" ] || there+=("$version"); done
  [ "${#there[@]}" -gt 0 ] || exit "$status"
  set -- "${there[@]}"
  printf '| LibTorch |%s\n' "$(printf ' %s |' "$@")"
  printf '|---|%s\n' "$(printf -- '---|%.0s' "$@")"
  columns=()
  for version in "$@"; do
    sed 's/.* | //' "$tables/$version" >"$tables/$version.outcome"
    columns+=("$tables/$version.outcome")
  done
  paste -d '|' <(sed 's/ | .*//' "$tables/$1") "${columns[@]}" | sed 's/|/ | /g; s/.*/| & |/'
  exit "$status"
fi
if [ "$mode" = quick ]; then
  at_work=()
  microreg_jobs=$((microreg_jobs > $# ? microreg_jobs / $# : 1))
  for version in "$@"; do
    { check "$version" || exit "$?"; } &
    at_work+=("$!")
  done
  for process in "${at_work[@]}"; do take wait "$process"; done
else
  for version in "$@"; do take check "$version"; done
fi
printf '\n%s\n\n' "$("$compiler" --version | head -n 1)"
printf '| LibTorch | ABI | compiled | test cases passed | assertions | CPU time | remarks |\n|---|---|---|---|---|---|---|\n'
for version in "$@"; do cat "$tables/$version"; done
exit "$status"
