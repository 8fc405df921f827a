#!/usr/bin/env bash
# Builds the tests, the benchmark and the trainer against a LibTorch for CUDA, on a machine that needs neither a GPU nor
# CUDA, and lays all that a machine with a GPU must be given into build/gpu/carry: 64 MB at most.
#
#     benchmarks/gpu/prepare.sh [--try] [CIFAR_FOLDER]
#
# CIFAR_FOLDER has the official binary files, of which a part goes along for the training; else it is on synthetic images.
# --try loads the programs here too, where they say that there is no device. It takes the 5 GB of CUDA libraries that pip
# installs beside torch.
#
# There, in a checkout with that folder:  benchmarks/gpu/run_gpu_checks.sh OUTPUT_FOLDER
#
# Environment, all optional:
#   MICROREG_GPU_TORCH    the version of torch's wheel on that machine [2.11.0], whose binaries it must be able to load
#   MICROREG_GPU_PYTHON   the version of Python there [3.12]
#   MICROREG_JOBS         parallel jobs
set -euo pipefail
case "${1:-}" in
  -h | --help)
    sed -n '2,16s/^# \{0,1\}//p' "$0"
    exit
    ;;
esac
try=""
if [ "${1:-}" = --try ]; then
  try=1
  shift
fi
source "$(dirname "${BASH_SOURCE[0]}")/../../cmake/bootstrap.sh"

torch="${MICROREG_GPU_TORCH:-2.11.0}"
python="${MICROREG_GPU_PYTHON:-3.12}"
folder="$microreg_root/build/gpu"
libtorch="$folder/torch-$torch"
tree="$folder/tree"
carry="$folder/carry"

microreg_require g++=c++ cmake=cmake ninja-build=ninja catch2 libfmt-dev libcli11-dev nlohmann-json3-dev unzip=unzip \
  python3=python3
microreg_count_jobs

# The wheel alone: its libraries refer to those of CUDA, which only the other machine needs.
if [ ! -e "$libtorch/torch/lib/libtorch_cuda.so" ]; then
  microreg_say "Fetching the wheel of torch $torch"
  pip=(python3 -m pip)
  if ! "${pip[@]}" --version >/dev/null 2>&1; then
    microreg_require python3-venv
    python3 -m venv "$folder/venv"
    pip=("$folder/venv/bin/python3" -m pip)
  fi
  mkdir -p "$folder/wheel"
  "${pip[@]}" download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version "$python" \
    --implementation cp --platform manylinux_2_28_x86_64 --dest "$folder/wheel" "torch==$torch" ||
    microreg_fail "pip could not download torch==$torch for Python $python"
  rm -rf "$libtorch"
  mkdir -p "$libtorch"
  unzip -q "$folder/wheel/torch-$torch"*.whl 'torch/include/*' 'torch/lib/*' 'torch/share/*' 'torch/version.py' -d "$libtorch"
  rm -r "$folder/wheel"
fi
[ -e "$libtorch/torch/lib/libtorch_cuda.so" ] || microreg_fail "the wheel of torch $torch is not one for CUDA"

microreg_say "Building against $(sed -n "s/^__version__ = '\(.*\)'/torch \1/p" "$libtorch/torch/version.py")"
log="$folder/configure.log"
cmake --preset release -S "$microreg_root" -B "$tree" "-DCMAKE_PREFIX_PATH=$libtorch/torch/share/cmake" >"$log" 2>&1 ||
  { cat "$log" >&2; microreg_fail "configuring failed"; }
programs=(microreg_tests penalty_overhead microreg_cifar)
cmake --build "$tree" --parallel "$microreg_jobs" --target "${programs[@]}"

microreg_say "Laying out $carry"
rm -rf "$carry"
mkdir -p "$carry/bin"
for program in "${programs[@]}"; do
  strip -o "$carry/bin/$program" "$(find "$tree" -type f -name "$program" -perm -u+x)"
done
# Headers for building the programs there, should these not load: benchmarks/gpu/build_there.sh. LibTorch brings fmt's.
mkdir "$carry/include"
for header in catch2/catch.hpp CLI/CLI.hpp nlohmann/json.hpp; do
  found="$(echo '#include <'"$header"'>' | "${CXX:-c++}" -x c++ -std=c++20 -E -M - | tr ' ' '\n' | grep "/$header\$")" ||
    { microreg_say "There is no <$header>: the programs cannot be built there"; continue; }
  cp -RL "$(dirname "$found")" "$carry/include/"
done
if [ -n "${1:-}" ]; then
  # 20 MB of the 180: one training file and a part of the test file, both whole images.
  mkdir "$carry/cifar10"
  image=3073
  for i in 1 2 3 4 5; do head -c $((image * 1200)) "$1/data_batch_$i.bin" >"$carry/cifar10/data_batch_$i.bin"; done
  head -c $((image * 1000)) "$1/test_batch.bin" >"$carry/cifar10/test_batch.bin"
fi
echo "$torch" >"$carry/torch_version"
du -sh "$carry"

if [ -n "$try" ]; then
  microreg_say "Trying them, with the CUDA libraries of torch $torch"
  if ! "$folder/try/bin/python3" -c 'import torch' 2>/dev/null; then
    python3 -m venv "$folder/try"
    "$folder/try/bin/python3" -m pip install --quiet --disable-pip-version-check "torch==$torch"
  fi
  libraries="$("$folder/try/bin/python3" -c 'import os, torch; print(os.path.join(torch.__path__[0], "lib"))' 2>/dev/null)"
  export LD_LIBRARY_PATH="$libraries"
  "$carry/bin/microreg_tests" "[cuda]"
  MICROREG_REHEARSE=cpu "$carry/bin/microreg_tests" "-#" "[#test_cuda_numbers]"
  "$carry/bin/penalty_overhead" --help | head -n 1
  "$carry/bin/microreg_cifar" --device cuda && microreg_fail "the trainer found a device" || true
fi
