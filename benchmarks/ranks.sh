#!/usr/bin/env bash
# What it costs to divide a training among ranks: the same steps by one process and by N, each on one thread, in turns.
#     ranks.sh PATH/TO/microreg_cifar [N [ROUNDS [TRAINER OPTION...]]]    options in place of the ones below
# Prints, for each round, milliseconds a step and processor milliseconds a step (of all ranks together), and in the end
# the medians, the bytes that a rank hands over in a step, and the efficiencies t1 / (N tN) and cpu1 / cpuN. The second
# says what the ranks do beside the work of one; the first also how they wait, and needs N idle cores.
set -euo pipefail
trainer=$1 ranks=${2:-2} rounds=${3:-5}
shift $(($# < 3 ? $# : 3))
[ $# -gt 0 ] || set -- --model resnet18 --width 16 --batch-size 128 --micro-batch-size 32 --train-size 512
options=("$@" --method gradient-norm --test-size 32 --log-every 1000 --checkpoint-every 0 --device cpu --threads 1)
few=3 many=9
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export MASTER_ADDR=127.0.0.1
TIMEFORMAT='%U %S'

# one N STEPS: "milliseconds-a-step processor-seconds" of a run.
one() {
  local n=$1 steps=$2 rank
  MASTER_PORT=$((20000 + RANDOM % 10000))
  export MASTER_PORT
  {
    time {
      if [ "$n" = 1 ]; then
        "$trainer" "${options[@]}" --steps "$steps" >"$folder/out"
      else
        local -a pids=()
        for ((rank = 0; rank < n; ++rank)); do
          RANK=$rank WORLD_SIZE=$n "$trainer" "${options[@]}" --steps "$steps" --distributed >"$folder/out$rank" &
          pids+=($!)
        done
        for rank in "${pids[@]}"; do wait "$rank"; done
        mv "$folder/out0" "$folder/out"
      fi
    }
  } 2>"$folder/time"
  sed -n 's/^completed.*(\([0-9]*\) ms a step).*/\1/p' "$folder/out"
  awk 'END { print $1 + $2 }' "$folder/time"
}

for ((round = 1; round <= rounds; ++round)); do
  for n in 1 "$ranks"; do
    mapfile -t short < <(one "$n" "$few")
    mapfile -t long < <(one "$n" "$many")
    cpu=$(awk -v a="${short[1]}" -v b="${long[1]}" -v n=$((many - few)) 'BEGIN { print 1000 * (b - a) / n }')
    echo "$n ${long[0]} $cpu" | tee -a "$folder/all"
  done
done
grep 'bytes a step' "$folder/out" || true
median() { awk -v n="$1" -v c="$2" '$1 == n { print $c }' "$folder/all" | sort -n | awk '{ a[NR] = $1 } END { print a[int((NR + 1) / 2)] }'; }
awk -v n="$ranks" -v t1="$(median 1 2)" -v tn="$(median "$ranks" 2)" -v c1="$(median 1 3)" -v cn="$(median "$ranks" 3)" 'BEGIN {
  printf "1 rank: %.0f ms, %.0f processor ms a step; %d ranks: %.0f ms, %.0f processor ms\n", t1, c1, n, tn, cn
  printf "efficiency %.3f by time, %.3f by processor time\n", t1 / (n * tn), c1 / cn }'
