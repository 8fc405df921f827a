#!/usr/bin/env bash
# Which share of the lines of include/ the tests run: builds the preset coverage, runs microreg_tests, prints a table and
# the sum, and fails below 95 %. The lines that are not run stand in build/coverage/lines.txt.
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

microreg_bootstrap
microreg_build microreg_tests
venv="$microreg_build_dir/venv"
if [ ! -x "$venv/bin/gcovr" ]; then
  microreg_require python3=python3 python3-venv
  python3 -m venv "$venv"
  "$venv/bin/python3" -m pip install --quiet --disable-pip-version-check --no-input gcovr==8.8
fi
find "$microreg_build_dir" -name '*.gcda' -delete
OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive "$microreg_build_dir/tests/microreg_tests" | tail -n 3
# A line in a template is run if it is in one of its instances.
"$venv/bin/gcovr" --root "$microreg_root" --object-directory "$microreg_build_dir" --filter "$microreg_root/include/" \
  --merge-mode-functions=merge-use-line-0 --merge-lines --gcov-ignore-parse-errors \
  --txt "$microreg_build_dir/lines.txt" --print-summary --fail-under-line 95 "$microreg_build_dir"
