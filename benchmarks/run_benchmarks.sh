#!/usr/bin/env bash
# Sets everything up, builds the benchmark, measures, compares with the peers' formulas in Python and draws the chart.
#     benchmarks/run_benchmarks.sh           everything: an hour or two on 2 cores, which should have nothing else to do
#     benchmarks/run_benchmarks.sh --quick   the same in a few minutes, into build/benchmarks-quick
# Records go to benchmarks/results/, the chart to docs/penalty_overhead.svg. MICROREG_THREADS sets the CPU threads.
set -euo pipefail

quick=""
case "${1:-}" in
  "") ;;
  --quick) quick=1 ;;
  -h | --help)
    sed -n '2,5s/^# \{0,1\}//p' "$0"
    exit
    ;;
  *)
    echo "error: unknown option $1; there is only --quick" >&2
    exit 2
    ;;
esac

source "$(dirname "${BASH_SOURCE[0]}")/../cmake/bootstrap.sh"
microreg_bootstrap
microreg_build penalty_overhead worker_study

program="$microreg_build_dir/benchmarks/penalty_overhead"
threads="${MICROREG_THREADS:-0}"
results="$microreg_root/benchmarks/results"
chart="$microreg_root/docs/penalty_overhead.svg"
options=()
half_options=(--model resnet18_w16 --model vit --model resnet18_w64 --micro-batch 32 --seconds 3)
peer_options=()
worker_options=()
if [ -n "$quick" ]; then
  results="$microreg_root/build/benchmarks-quick"
  chart="$results/penalty_overhead.svg"
  options=(--quick)
  half_options=(--model cnn --micro-batch 32 --seconds 0.5)
  peer_options=(--model resnet18_w16 --model cnn --seconds 5)
  worker_options=(--model cnn --seconds 3)
fi
mkdir -p "$results"

microreg_say "Penalised against plain steps"
"$program" "${options[@]}" --threads "$threads" --json "$results/penalty_overhead.json" \
  --sweep-json "$results/sweeps.json" | tee "$results/penalty_overhead.txt"

for type in float32 bfloat16; do
  echo
  microreg_say "Under autocast to $type"
  "$program" "${half_options[@]}" --autocast "$type" --penalty gradient_norm --estimator exact --fused on --no-sweep \
    --no-memory --threads "$threads" --json "$results/autocast_$type.json" | tee "$results/autocast_$type.txt"
done

echo
microreg_say "Workers, beside busy processes too"
"$microreg_build_dir/benchmarks/worker_study" "${worker_options[@]}" --busy 0 --busy 1 --busy 2 |
  tee "$results/workers.txt"

# The peers need the Python side of the same LibTorch.
if [ -n "$microreg_python" ] && "$microreg_python" -c "import torch" >/dev/null 2>&1; then
  echo
  microreg_say "Peers"
  "$microreg_python" "$microreg_root/benchmarks/peers/compare.py" "$program" "${peer_options[@]}" \
    --threads "$threads" --json "$results/peers.json" | tee "$results/peers.txt"
  "$microreg_python" "$microreg_root/benchmarks/peers/compare.py" "$program" "${peer_options[@]}" \
    --threads "$threads" --micro-batches 4 --workers 2 --best --json "$results/peers_workers.json" |
    tee "$results/peers_workers.txt"
else
  microreg_say "Peers: skipped, no Python can import this LibTorch"
fi

python_with_matplotlib() {
  local python
  for python in "$microreg_python" python3 "$microreg_root/build/plot-venv/bin/python3"; do
    if [ -n "$python" ] && "$python" -c "import matplotlib" >/dev/null 2>&1; then
      echo "$python"
      return
    fi
  done
  microreg_require python3=python3 python3-venv >&2
  rm -rf "$microreg_root/build/plot-venv"
  python3 -m venv "$microreg_root/build/plot-venv" >&2
  "$microreg_root/build/plot-venv/bin/python3" -m pip install --quiet --disable-pip-version-check matplotlib >&2
  echo "$microreg_root/build/plot-venv/bin/python3"
}
echo
microreg_say "Chart"
"$(python_with_matplotlib)" "$microreg_root/benchmarks/plot.py" "$results" "$chart"
echo "Records: $results. Chart: $chart."
