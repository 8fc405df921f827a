#!/usr/bin/env bash
# Two ranks take the steps of one process, and their checkpoint goes on with one.
#     test_ranks.sh PATH/TO/microreg_cifar PATH/TO/run.sh
set -euo pipefail

trainer=$1 run=$2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
options=(--width 4 --method gradient-norm --augment --image-size 16 --train-size 64 --test-size 32 --batch-size 40
  --micro-batch-size 8 --log-every 3 --checkpoint-every 3 --device cpu --threads 1)

losses() { sed -n 's/.*"train_loss":\([^,]*\).*/\1/p' "$folder/$1/metrics.jsonl"; }
fail() {
  echo "error: $*" >&2
  exit 1
}

"$trainer" "${options[@]}" --steps 6 --output "$folder/alone" >"$folder/alone.log"
"$run" 2 program "$trainer" "${options[@]}" --steps 3 --output "$folder/ranks" --distributed >"$folder/ranks.log"
grep -q '2 ranks' "$folder/ranks.log" || fail "it does not say how many ranks there are"
[ "$(grep -c '^completed' "$folder/ranks.log")" = 1 ] || fail "another rank than the first has printed"
"$trainer" "${options[@]}" --steps 6 --output "$folder/ranks" --resume >>"$folder/ranks.log"
[ "$(losses ranks | wc -l)" = 2 ] || fail "the records are not those of 6 steps"
paste <(losses alone) <(losses ranks) | awk '{ d = ($1 - $2) / $1; if (d * d > 1e-8) exit 1 }' ||
  fail "the losses differ: $(losses alone) and $(losses ranks)"
echo "two ranks, then one: the losses of one process"
