#!/usr/bin/env bash
# Checks the recipes of package managers as far as their tools are here:
#
#     packaging/check.sh [vcpkg|conan|conda]...    by default all; 77 if a tool is missing and nothing else was checked
#
#   vcpkg   the port's own steps, with stand-ins for vcpkg's functions; a project that finds what they install, and runs
#   conan   `conan create`, which builds, runs the test package and so compiles the library with the LibTorch that
#           CMAKE_PREFIX_PATH names (python3 -m pip install conan)
#   conda   renders the recipe and builds it with this machine's CMake instead of conda-forge's; a project that finds what
#           is in the package, and runs
#           (python3 -m pip install py-rattler-build pyyaml)
#
# CONAN and RATTLER_PYTHON name the conan and the Python to take. Nothing is written outside of a temporary folder.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
version="$(sed -n 's/.*version = "\([0-9.]*\)".*/\1/p' "$root/include/microreg/version.hpp")"
python="${RATTLER_PYTHON:-python3}"

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# What a package has to hold, wherever its config lies: the files of an ordinary install, and nothing compiled.
files_of() {
  (cd "$1" && find . -type f \( -path '*/include/*' -o -name '*.cmake' -o -name 'microreg.cpp' \) |
    sed 's|.*/cmake/microreg/|config/|; s|^\./share/microreg/|config/|' | sort)
}
same_as_install() {
  if [ ! -d "$work/install" ]; then
    cmake -S "$root" -B "$work/build" -DMICROREG_BUILD_{TESTS,EXAMPLES,BENCHMARKS}=OFF >/dev/null
    cmake --install "$work/build" --prefix "$work/install" >/dev/null
    [ "$(files_of "$work/install" | wc -l)" -gt 50 ] || fail "an ordinary install has no headers"
  fi
  diff <(files_of "$work/install") <(files_of "$1") || fail "$1 does not hold what an install holds"
}

# consumer_runs FOLDER: a project finds what is installed there, is built and runs.
consumer_runs() {
  local build="$1-consumer"
  CMAKE_PREFIX_PATH="$1${CMAKE_PREFIX_PATH:+:$CMAKE_PREFIX_PATH}" \
    cmake -S "$root/packaging/conan/test_package" -B "$build" -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE=-O0 \
    >"$build.log" 2>&1 && cmake --build "$build" >>"$build.log" 2>&1 && "$build/consumer" >>"$build.log" || {
    tail -n 50 "$build.log"
    fail "a project does not find, or cannot use, the package in $1"
  }
  grep -q "^microreg $version: |grad|" "$build.log" || fail "the program of the package in $1 did not run"
}

check_vcpkg() {
  grep -q "\"version\": \"$version\"" "$root/packaging/vcpkg/microreg/vcpkg.json" || fail "vcpkg.json is not of $version"
  cat >"$work/port.cmake" <<'CMAKE'
function(vcpkg_cmake_configure)
  cmake_parse_arguments(PARSE_ARGV 0 arg "" "SOURCE_PATH" "OPTIONS")
  execute_process(COMMAND "${CMAKE_COMMAND}" -S "${arg_SOURCE_PATH}" -B "${BUILD}" -DCMAKE_BUILD_TYPE=Release
                          "-DCMAKE_INSTALL_PREFIX=${CURRENT_PACKAGES_DIR}" ${arg_OPTIONS}
                  OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)
endfunction()
function(vcpkg_cmake_install)
  execute_process(COMMAND "${CMAKE_COMMAND}" --build "${BUILD}" --target install OUTPUT_QUIET
                  COMMAND_ERROR_IS_FATAL ANY)
endfunction()
function(vcpkg_install_copyright)
  cmake_parse_arguments(PARSE_ARGV 0 arg "" "" "FILE_LIST")
  file(INSTALL ${arg_FILE_LIST} DESTINATION "${CURRENT_PACKAGES_DIR}/share/${PORT}")
endfunction()
include("${PORTFILE}")
CMAKE
  cmake -DPORT=microreg "-DBUILD=$work/vcpkg-build" "-DCURRENT_PACKAGES_DIR=$work/vcpkg" \
    "-DPORTFILE=$root/packaging/vcpkg/microreg/portfile.cmake" -P "$work/port.cmake" >/dev/null
  [ -e "$work/vcpkg/share/microreg/microregConfig.cmake" ] || fail "the port's config is not in share/microreg"
  [ -e "$work/vcpkg/share/microreg/usage" ] && [ -e "$work/vcpkg/share/microreg/LICENSE" ] ||
    fail "the port has no usage or no license"
  same_as_install "$work/vcpkg"
  consumer_runs "$work/vcpkg"
  echo "vcpkg: the port installs microreg $version, and a project that finds it runs"
}

check_conan() {
  local conan="${CONAN:-conan}"
  command -v "$conan" >/dev/null || return 77
  export CONAN_HOME="$work/conan"
  "$conan" profile detect >/dev/null 2>&1
  # In a copy: the test package is built where it stands.
  mkdir "$work/source"
  cp -r "$root"/{CMakeLists.txt,LICENSE,cmake,include,packaging} "$work/source"
  mkdir "$work/source/tests" && cp -r "$root/tests/consumer" "$work/source/tests"
  "$conan" create "$work/source/packaging/conan" -s compiler.cppstd=20 -s build_type=Release \
    -c 'tools.cmake.cmaketoolchain:extra_variables={"CMAKE_CXX_FLAGS_RELEASE": "-O0"}' >"$work/conan.log" 2>&1 || {
    tail -n 50 "$work/conan.log"
    fail "conan create failed"
  }
  grep -q "^microreg $version: |grad|" "$work/conan.log" || fail "conan's test package did not run"
  same_as_install "$(sed -n 's/.*Package folder //p' "$work/conan.log" | tail -n 1)"
  echo "conan: microreg/$version is created, and its test package runs"
}

check_conda() {
  "$python" -c 'import rattler_build, yaml' 2>/dev/null || return 77
  "$python" - "$root" "$work/conda" "$version" <<'PYTHON' >"$work/conda.log" 2>&1 || {
import pathlib, sys, tarfile
import rattler_build, yaml

root, output, version = sys.argv[1:]
file = pathlib.Path(root, "packaging", "conda", "recipe.yaml")
rendered = rattler_build.Stage0Recipe.from_file(file).render()
assert [v.recipe.package.version for v in rendered] == [version], "recipe.yaml is of another version"
recipe = yaml.safe_load(file.read_text())
del recipe["requirements"]["build"]
recipe["source"]["path"] = root
recipe = rattler_build.Stage0Recipe.from_dict(recipe, recipe_dir=output + "-recipe")
built = recipe.run_build(output_dir=output, channels=[], env_isolation=rattler_build.EnvironmentIsolation.NONE,
                         package_format="tar-bz2")
assert len(built) == 1 and len(built[0].packages) == 1
tarfile.open(built[0].packages[0]).extractall(output + "-package")
PYTHON
    tail -n 50 "$work/conda.log"
    fail "the conda recipe does not build"
  }
  same_as_install "$work/conda-package"
  consumer_runs "$work/conda-package"
  echo "conda: the recipe renders and builds a package of $version that holds what it says, and a project that finds it runs"
}

[ $# -gt 0 ] || set -- vcpkg conan conda
checked=0
for tool in "$@"; do
  set +e
  (set -e && "check_$tool")  # in a condition it would go on after an error
  status=$?
  set -e
  case "$status" in
    0) checked=1 ;;
    77) echo "$tool: skipped, the tool is not here" ;;
    *) exit "$status" ;;
  esac
done
[ "$checked" -eq 1 ] || exit 77
