#!/usr/bin/env bash
# Sets everything up, builds the release preset into build/release and runs all tests. Arguments are handed to ctest:
#     tests/run_tests.sh                    all tests
#     tests/run_tests.sh -R fisher_trace    those whose name matches
set -euo pipefail
case "${1:-}" in
  -h | --help)
    sed -n '2,4s/^# \{0,1\}//p' "$0"
    exit
    ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/../cmake/bootstrap.sh"

microreg_bootstrap
microreg_build

record="$microreg_build_dir/tests.xml"
rm -f "$record"
status=0
ctest --test-dir "$microreg_build_dir" --output-on-failure --no-tests=error --parallel "$microreg_jobs" \
  --output-junit "$record" "$@" || status=$?

# ctest counts a skipped test as passed; this line does not.
if [ -e "$record" ]; then
  count() { sed -n "s/^[[:space:]]*$1=\"\([0-9]*\)\".*/\1/p" "$record" | head -n 1; }
  total="$(count tests)" failed="$(count failures)" skipped="$(count skipped)" disabled="$(count disabled)"
  skipped=$((${skipped:-0} + ${disabled:-0}))
  echo
  echo "$((${total:-0} - ${failed:-0} - skipped)) passed, ${failed:-0} failed, $skipped skipped"
fi
exit "$status"
