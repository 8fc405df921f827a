#!/usr/bin/env bash
# Sets everything up, builds the CIFAR trainer and trains a small CNN on synthetic images with large batches: plainly,
# with the gradient-norm penalty and with the Fisher-trace penalty. Shows the test accuracies side by side.
#     examples/run_demo.sh           about a minute on 2 cores, once built
#     examples/run_demo.sh --quick   a few steps only, to see that it runs
# MICROREG_DEMO_STEPS sets the number of steps.
set -euo pipefail

# "method=further options": the settings of the comparison.
runs=(
  "large-batch="
  "gradient-norm=--strength 0.03"
  "fisher-trace=--strength 0.05"
)
common=(--data synthetic --model cnn --image-size 16 --train-size 1000 --test-size 1000 --batch-size 128 --learning-rate 0.2
  --seed 2)
steps=400
records=8

case "${1:-}" in
  "") ;;
  --quick) steps=4 records=2 ;;
  -h | --help)
    sed -n '2,6s/^# \{0,1\}//p' "$0"
    exit
    ;;
  *)
    echo "error: unknown option $1; there is only --quick" >&2
    exit 2
    ;;
esac
steps="${MICROREG_DEMO_STEPS:-$steps}"
if ! [[ "$steps" =~ ^[1-9][0-9]*$ ]]; then
  echo "error: MICROREG_DEMO_STEPS is '$steps'; it must be a number of steps, at least 1" >&2
  exit 2
fi
# A record costs an evaluation: eight of them, two of a quick run.
log_every=$(((steps + records - 1) / records))

source "$(dirname "${BASH_SOURCE[0]}")/../cmake/bootstrap.sh"
microreg_bootstrap
microreg_build microreg_cifar

trainer="$microreg_build_dir/examples/cifar/microreg_cifar"
output="$microreg_root/build/demo"
rm -rf "$output"
mkdir -p "$output"
SECONDS=0
methods=()
for run in "${runs[@]}"; do
  method="${run%%=*}"
  methods+=("$method")
  read -r -a options <<<"${run#*=}"
  echo
  microreg_say "$method"
  "$trainer" "${common[@]}" --method "$method" "${options[@]}" --steps "$steps" --log-every "$log_every" \
    --output "$output/$method"
done

# One line a record, "method step accuracy", into a table and a bar for each method's last record.
number() { sed -n "s/.*\"$1\": *\([-+0-9.eE]*\).*/\1/p"; }
for method in "${methods[@]}"; do
  metrics="$output/$method/metrics.jsonl"
  [ -s "$metrics" ] || microreg_fail "the trainer wrote no records to $metrics"
  paste <(number step <"$metrics") <(number test_accuracy <"$metrics") | sed "s/^/$method	/"
done | awk -F '\t' -v seconds="$SECONDS" '
  !($1 in last) { methods[++m] = $1 }
  !($2 in seen) { seen[$2] = 1; steps[++n] = $2 }
  {
    if (NF != 3 || $2 == "" || $3 == "") { print "error: a record without step or test_accuracy"; failed = 1; exit 1 }
    accuracy[$1, $2] = 100 * $3
    last[$1] = 100 * $3
  }
  END {
    if (failed) exit 1
    printf "\nTest accuracy in %% by step (%d s of training)\n\n  step", seconds
    for (i = 1; i <= m; ++i) printf "%16s", methods[i]
    print ""
    for (j = 1; j <= n; ++j) {
      printf "%6d", steps[j]
      for (i = 1; i <= m; ++i) printf "%16s", (methods[i], steps[j]) in accuracy ? sprintf("%.1f", accuracy[methods[i], steps[j]]) : "-"
      print ""
    }
    print ""
    for (i = 1; i <= m; ++i) {
      bar = sprintf("%*s", int(last[methods[i]] / 2 + 0.5), "")
      gsub(/ /, "#", bar)
      printf "  %-14s |%-50s| %5.1f %%\n", methods[i], bar, last[methods[i]]
    }
  }'
echo
echo "Records and summaries: $output/<method>/. More: $trainer --help"
