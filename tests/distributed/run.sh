#!/usr/bin/env bash
# Several processes over Gloo, on this machine.
#     run.sh RANKS equal|kill|hang|throw PATH/TO/ranks
#     run.sh RANKS program PATH/TO/PROGRAM [ARGUMENT...]    with MASTER_ADDR and MASTER_PORT, as torchrun starts it
# Rank 1 may end as it likes where it is killed or hangs; all others have to exit with 0, within 60 s.
set -euo pipefail
ranks=$1 mode=$2
shift 2
folder=$(mktemp -d)
pids=()
clean_up() {
  for pid in "${pids[@]}"; do kill -9 -- "-$pid" 2>/dev/null || true; done  # timeout leads a group of its own
  rm -rf "$folder"
}
trap clean_up EXIT

if [ "$mode" = program ]; then
  command=("$@")
  export MASTER_ADDR=127.0.0.1 MASTER_PORT=$((20000 + RANDOM % 10000))
else
  command=("$1" gloo "$folder/store" "$mode")
fi
for ((rank = 0; rank < ranks; ++rank)); do
  RANK=$rank WORLD_SIZE=$ranks OMP_NUM_THREADS=1 timeout -s KILL 60 "${command[@]}" &
  pids+=($!)
done
code=0
for ((rank = 0; rank < ranks; ++rank)); do
  if [ "$rank" = 1 ] && { [ "$mode" = kill ] || [ "$mode" = hang ]; }; then continue; fi
  wait "${pids[rank]}" || code=$?
done
exit "$code"
