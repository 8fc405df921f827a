#!/usr/bin/env bash
# Sets everything up, builds the release preset into build/release and runs all tests. Arguments are handed to ctest:
#     tests/run_tests.sh                    all tests
#     tests/run_tests.sh -R estimator       those whose name matches: a test is a file of test cases
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
  --test-output-size-passed 1000000 --test-output-size-failed 1000000 --output-junit "$record" "$@" || status=$?

# ctest counts a file of test cases as one test, and a skipped one as passed; this line counts cases, from what each
# file's run says at its end, and everything else as one. A run that ended before it could say so is one failure.
if [ -e "$record" ]; then
  awk '
    function number(text, pattern) {
      return match(text, pattern) ? substr(text, RSTART, RLENGTH) + 0 : 0
    }
    function finish() {
      if (status == "fail") { failed += of_cases > of_passed ? of_cases - of_passed : 1; passed += of_passed }
      else if (status == "run") passed += of_cases ? of_cases : 1
      else if (status != "") skipped += of_cases ? of_cases : 1
      status = ""
    }
    /<testcase / {
      finish()
      status = match($0, / status="[a-z]*"/) ? substr($0, RSTART + 9, RLENGTH - 10) : "run"
      of_cases = of_passed = 0
    }
    /All tests passed \(/ { of_cases = number($0, "[0-9]+ test case"); of_passed = of_cases }
    /test cases: +[0-9]+ \|/ {
      of_cases = number($0, "[0-9]+ \\|")
      of_passed = number($0, "[0-9]+ passed")
    }
    END { finish(); printf "\n%d passed, %d failed, %d skipped\n", passed, failed, skipped }' "$record"
fi
exit "$status"
