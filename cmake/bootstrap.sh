# shellcheck shell=bash
# Set-up shared by tests/run_tests.sh, examples/run_demo.sh and .ci/run: source it, then call microreg_bootstrap and
# microreg_build. On a fresh Debian 12 machine it installs what is missing; on a machine that has everything it takes a
# few seconds.
#
# Environment, all optional:
#   CMAKE_PREFIX_PATH            where LibTorch is, if it is not beside an importable Python torch
#   MICROREG_CONFIGURE_OPTIONS   more options for cmake, separated by spaces
#   MICROREG_JOBS                parallel jobs; by default one a core, as far as memory allows

microreg_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
microreg_preset="${microreg_preset:-release}"  # a script that wants another one sets it before
microreg_build_dir="$microreg_root/build/$microreg_preset"
microreg_torch_version="2.13.0"

microreg_say() { printf '== %s\n' "$*"; }
microreg_fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# microreg_missing_packages [package=command]...: prints the Debian packages that are not there. A package given with a
# command counts as there if the command is, wherever it came from.
microreg_missing_packages() {
  local item
  for item in "$@"; do
    case "$item" in
      *=*) command -v "${item#*=}" >/dev/null 2>&1 || echo "${item%%=*}" ;;
      *) dpkg -s "$item" >/dev/null 2>&1 || echo "$item" ;;
    esac
  done
}

# microreg_require [package=command]...: installs what is missing through apt, as root or with sudo that asks for no
# password; otherwise says what to install.
microreg_require() {
  if ! command -v dpkg >/dev/null 2>&1 || ! command -v apt-get >/dev/null 2>&1; then
    microreg_require_without_apt "$@"
    return
  fi
  local -a missing as_root=()
  mapfile -t missing < <(microreg_missing_packages "$@")
  [ "${#missing[@]}" -eq 0 ] && return
  if [ "$(id -u)" -ne 0 ]; then
    if ! sudo -n true >/dev/null 2>&1; then
      microreg_fail "these packages are missing, and installing them needs root. Run
    sudo apt-get update && sudo apt-get install -y ${missing[*]}
and start this script again."
    fi
    as_root=(sudo -n)
  fi
  microreg_say "Installing ${missing[*]}"
  local -a apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300)
  "${apt[@]}" update || microreg_fail "apt-get update failed; check the network, or install by hand: ${missing[*]}"
  "${apt[@]}" install -y --no-install-recommends "${missing[@]}" >/dev/null ||
    microreg_fail "apt-get could not install: ${missing[*]}"
}

# Where there is no apt: the commands must be there; libraries are looked for by CMake, which says what it misses.
microreg_require_without_apt() {
  local item missing=""
  for item in "$@"; do
    case "$item" in *=*) command -v "${item#*=}" >/dev/null 2>&1 || missing+=" ${item#*=}" ;; esac
  done
  [ -z "$missing" ] || microreg_fail "missing commands:$missing. On Debian 12 this script installs the packages $*;
install their equivalents on this system and start it again."
}

# Whether LibTorch is in an entry of CMAKE_PREFIX_PATH, which may be separated by : or ;.
microreg_torch_in_prefix_path() {
  local -a entries
  local entry
  IFS=':;' read -r -a entries <<<"${CMAKE_PREFIX_PATH:-}"
  for entry in "${entries[@]}"; do
    if [ -e "$entry/share/cmake/Torch/TorchConfig.cmake" ] || [ -e "$entry/Torch/TorchConfig.cmake" ] ||
      [ -e "$entry/TorchConfig.cmake" ]; then
      # A prefix inside a Python's site-packages: that Python can import torch.
      [ -x "${entry%%/lib/python*}/bin/python3" ] && microreg_python="${entry%%/lib/python*}/bin/python3"
      return 0
    fi
  done
  return 1
}

# Prints the prefix of the torch that Python $1 can import.
microreg_torch_of_python() { "$1" -c "import torch; print(torch.utils.cmake_prefix_path)" 2>/dev/null; }

# LibTorch from pip, in a virtual environment inside the build tree.
microreg_torch_from_pip() {
  local venv="$microreg_root/build/venv"
  microreg_python="$venv/bin/python3"
  if [ -x "$microreg_python" ] && microreg_torch_prefix="$(microreg_torch_of_python "$microreg_python")"; then
    return
  fi
  microreg_require python3=python3
  if ! python3 -c 'import ensurepip, venv' >/dev/null 2>&1; then
    microreg_require python3-venv
  fi
  microreg_say "Installing torch==$microreg_torch_version into build/venv"
  rm -rf "$venv"
  mkdir -p "$microreg_root/build"
  python3 -m venv "$venv" || /usr/bin/python3 -m venv "$venv" || microreg_fail "python3 -m venv failed"
  # Without a GPU, prefer the CPU build from PyTorch's own index, where that can be reached: PyPI's brings gigabytes of
  # CUDA libraries along.
  local -a index=()
  local cpu_index="https://download.pytorch.org/whl/cpu"
  if ! command -v nvidia-smi >/dev/null 2>&1 &&
    "$microreg_python" -c "import urllib.request as u; u.urlopen('$cpu_index/torch/', timeout=5)" >/dev/null 2>&1; then
    index=(--extra-index-url "$cpu_index")
  fi
  "$microreg_python" -m pip install --quiet --disable-pip-version-check --no-input "${index[@]}" \
    "torch==$microreg_torch_version" ||
    microreg_fail "pip could not install torch==$microreg_torch_version. Install LibTorch by hand
(https://pytorch.org/get-started/locally) and start this script again with CMAKE_PREFIX_PATH=/path/to/libtorch."
  microreg_torch_prefix="$(microreg_torch_of_python "$microreg_python")" ||
    microreg_fail "the torch in build/venv cannot be imported; see $microreg_python -c 'import torch'"
}

# Sets microreg_python, and microreg_torch_prefix unless CMAKE_PREFIX_PATH says it all.
microreg_find_torch() {
  microreg_python=""
  microreg_torch_prefix=""
  if microreg_torch_in_prefix_path; then
    microreg_say "LibTorch: from CMAKE_PREFIX_PATH"
    return
  fi
  local python
  python="$(command -v python3 || true)"
  if [ -n "$python" ] && microreg_torch_prefix="$(microreg_torch_of_python "$python")"; then
    microreg_python="$python"
    microreg_say "LibTorch: $microreg_torch_prefix, from $python"
    return
  fi
  microreg_torch_from_pip
  microreg_say "LibTorch: build/venv"
}

# One job a core, but no more than memory allows: a translation unit that includes LibTorch takes up to 2.5 GB.
microreg_count_jobs() {
  local cores memory
  cores="$(nproc)"
  memory="$(awk '/^MemAvailable/ { print int($2 / 2500000) }' /proc/meminfo)"
  microreg_jobs="${MICROREG_JOBS:-$((memory < cores ? memory : cores))}"
  [ "$microreg_jobs" -ge 1 ] 2>/dev/null || microreg_jobs=1
}

# Packages, LibTorch, and the preset configured into its folder under build.
microreg_bootstrap() {
  microreg_require g++=c++ cmake=cmake ninja-build=ninja catch2 libfmt-dev libcli11-dev nlohmann-json3-dev \
    libbenchmark-dev libgloo-dev libopenmpi-dev openmpi-bin
  microreg_find_torch
  microreg_count_jobs

  local -a options=()
  [ -z "$microreg_torch_prefix" ] ||
    options+=("-DCMAKE_PREFIX_PATH=$microreg_torch_prefix${CMAKE_PREFIX_PATH:+;${CMAKE_PREFIX_PATH//:/;}}")
  [ -z "$microreg_python" ] || options+=("-DMICROREG_PYTHON=$microreg_python")
  local -a more
  read -r -a more <<<"${MICROREG_CONFIGURE_OPTIONS:-}"
  # A build folder remembers the LibTorch that it was configured with: another one needs a fresh start.
  local stamp="$microreg_build_dir/.libtorch" used="$microreg_torch_prefix ${CMAKE_PREFIX_PATH:-}"
  if [ -e "$microreg_build_dir/CMakeCache.txt" ] && [ "$(cat "$stamp" 2>/dev/null)" != "$used" ]; then
    options+=(--fresh)
  fi
  microreg_say "Configuring build/$microreg_preset"
  mkdir -p "$microreg_build_dir"
  local log="$microreg_build_dir/configure.log"
  if ! (cd "$microreg_root" && cmake --preset "$microreg_preset" "${options[@]}" "${more[@]}") >"$log" 2>&1; then
    cat "$log" >&2
    microreg_fail "configuring failed"
  fi
  printf '%s' "$used" >"$stamp"
}

# microreg_build [target]...: builds all, or the targets named.
microreg_build() {
  microreg_say "Building${1:+ $*} with $microreg_jobs job$([ "$microreg_jobs" -eq 1 ] || echo s) (the first time takes minutes)"
  cmake --build "$microreg_build_dir" --parallel "$microreg_jobs" ${1:+--target "$@"} ||
    microreg_fail "the build failed"
}
