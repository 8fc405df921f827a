#!/usr/bin/env bash
# Checks that all C++ files are formatted; with --fix it formats them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cmake/bootstrap.sh"

microreg_require clang-format-19=clang-format-19
cd "$microreg_root"
mapfile -d '' -t files < <(find include tests examples benchmarks -name '*.[hc]pp' -print0)
if [ "${1:-}" = "--fix" ]; then
  clang-format-19 -i "${files[@]}"
else
  clang-format-19 --dry-run -Werror "${files[@]}" ||
    microreg_fail "some files are not formatted; run tests/check_format.sh --fix"
fi
echo "${#files[@]} files are formatted"
