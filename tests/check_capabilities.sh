#!/usr/bin/env bash
# The numerical tests once more, with the kernels that LibTorch takes on lesser processors (ATEN_CPU_CAPABILITY) and with
# one and two threads. run_tests.sh, which has to have built them, takes those of this processor.
set -euo pipefail
case "${1:-}" in
  -h | --help)
    sed -n '2,3s/^# \{0,1\}//p' "$0"
    exit
    ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
program=build/release/tests/microreg_tests
[ -x "$program" ] || { echo "error: there is no $program; run tests/run_tests.sh first" >&2; exit 1; }

numerical=""
for name in autocast average_jacobian closed_forms difference_checks estimator exact_surprises finite_differences fisher_trace \
  fused_activations fused_batch_norm fused_convolution fused_group_norm fused_max_pool fused_normalisation fused_transformer \
  gates_differences gates_operations gradient_norm half jacobian_norm loss_scale oracle properties unit_jacobian unsquared; do
  numerical+="[#test_$name],"
done

capabilities=(default)
grep -qw avx512f /proc/cpuinfo && capabilities+=(avx2)
capabilities+=("")  # this processor's own
status=0
for capability in "${capabilities[@]}"; do
  for threads in 1 2; do
    what="${capability:-this processor} kernels, $threads thread$([ "$threads" = 1 ] || echo s)"
    log="build/release/tests/capability-${capability:-own}-$threads.log"
    if env ${capability:+"ATEN_CPU_CAPABILITY=$capability"} OMP_NUM_THREADS="$threads" OMP_WAIT_POLICY=passive \
      "$program" "-#" "${numerical%,}" >"$log" 2>&1; then
      echo "$what: $(tail -n 2 "$log" | head -n 1)"
    else
      echo "$what: FAILED, see $log"
      tail -n 40 "$log"
      status=1
    fi
  done
done
exit "$status"
