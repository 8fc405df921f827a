#!/usr/bin/env bash
# Several ranks take the steps of one process, whoever starts them; their checkpoint goes on with another number of them;
# a signal to one rank stops all after the same step.
#     test_ranks.sh PATH/TO/microreg_cifar PATH/TO/run.sh [PYTHON-WITH-TORCH [MPIRUN]]    (without a Python: '')
set -euo pipefail

trainer=$1 run=$2 python=${3:-} mpirun=${4:-}
folder=$(mktemp -d)
pid=""
trap 'if [ -n "$pid" ]; then kill -TERM "$pid" 2>/dev/null || true; fi; rm -rf "$folder"' EXIT
options=(--width 4 --method gradient-norm --augment --image-size 16 --train-size 64 --test-size 32 --batch-size 40
  --micro-batch-size 8 --log-every 1 --checkpoint-every 3 --device cpu --threads 1)
export OMP_NUM_THREADS=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 \
  OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_btl_vader_single_copy_mechanism=none OMPI_MCA_plm=isolated

losses() { sed -n 's/.*"train_loss":\([^,]*\).*/\1/p' "$folder/$1/metrics.jsonl"; }
fail() {
  echo "error: $*" >&2
  cat "$folder"/*.log >&2
  exit 1
}
# go_on STEPS LAUNCHER...: to so many steps.
go_on() {
  local steps=$1
  shift
  timeout -s KILL 90 "$@" --steps "$steps" --output "$folder/ranks" --resume >>"$folder/ranks.log" 2>&1 ||
    fail "$* failed with $?"
}

"$trainer" "${options[@]}" --steps 6 --output "$folder/alone" >"$folder/alone.log"
if "$python" -c 'import torch' 2>/dev/null; then
  launcher=("$python" -m torch.distributed.run --standalone --no-python --nproc-per-node 2)
  echo "two ranks by torchrun"
else
  launcher=("$run" program 2)
fi
go_on 2 "${launcher[@]}" "$trainer" "${options[@]}" --distributed
grep -q '2 ranks' "$folder/ranks.log" || fail "it does not say how many ranks there are"
[ "$(grep -c '^completed' "$folder/ranks.log")" = 1 ] || fail "another rank than the first has printed"
go_on 3 "$trainer" "${options[@]}"
if [ -n "$mpirun" ]; then
  echo "two ranks by mpirun"
  go_on 6 "$mpirun" -np 2 "$trainer" "${options[@]}" --distributed mpi
else
  go_on 6 "$run" program 3 "$trainer" "${options[@]}" --distributed
fi
[ "$(losses ranks | wc -l)" = 6 ] || fail "the records are not those of 6 steps"
paste <(losses alone) <(losses ranks) | awk '{ d = ($1 - $2) / $1; if (d * d > 1e-8) exit 1 }' ||
  fail "the losses differ: $(losses alone) and $(losses ranks)"

"$run" program 2 "$trainer" "${options[@]}" --steps 1000000 --output "$folder/stopped" --distributed \
  >"$folder/stopped.log" 2>&1 &
pid=$!
for ((tick = 0; tick < 600; ++tick)); do
  [ "$(cat "$folder/stopped/metrics.jsonl" 2>/dev/null | wc -l)" -lt 2 ] || break
  sleep 0.1
done
kill -USR1 "$pid"  # SIGINT to rank 1
code=0
wait "$pid" || code=$?
pid=""
[ "$code" = 130 ] || fail "a signal to rank 1 ended the run with $code"
grep -q '"status": "interrupted"' "$folder/stopped/summary.json" || fail "the summary does not say interrupted"
grep -q 'stopped by signal 2 after step' "$folder/stopped.log" || fail "rank 0 does not say what stopped it"
echo "several ranks, then one, then several: the losses of one process; a signal to one rank stops all"
