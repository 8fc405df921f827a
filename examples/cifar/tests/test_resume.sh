#!/usr/bin/env bash
# Kills a run with SIGKILL at random moments, resumes it each time, and compares the weights at the end, bitwise, with
# those of a run that was left alone; then the same once with SIGINT and SIGTERM.
#     test_resume.sh PATH/TO/microreg_cifar
set -euo pipefail

trainer=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
options=(--model resnet18 --width 2 --method fisher-trace --augment --image-size 16 --train-size 64 --test-size 32
  --batch-size 32 --micro-batch-size 16 --steps 120 --log-every 7 --checkpoint-every 5 --threads 1)

checksum() { sed -n 's/.*"weights_checksum": "\(.*\)".*/\1/p' "$1/summary.json"; }
metrics() { sed 's/,"seconds":[^,}]*//' "$1/metrics.jsonl"; }
fail() {
  echo "error: $*" >&2
  exit 1
}
same_end() {
  [ -n "$(checksum "$folder/alone")" ] || fail "no checksum in the summary"
  [ "$(checksum "$folder/$1")" = "$(checksum "$folder/alone")" ] || fail "$1: the weights differ"
  [ "$(metrics "$folder/$1")" = "$(metrics "$folder/alone")" ] || fail "$1: the records differ"
}
# The number of records that are there: how far a run is.
records() { if [ -e "$1/metrics.jsonl" ]; then wc -l <"$1/metrics.jsonl"; else echo 0; fi; }
# Starts or resumes a run and sends it `signal` some moments after it has made another `more` records, twice at once, as
# `timeout` does; its exit code.
stopped() {
  local run=$1 signal=$2 more=$3 before pid
  before=$(records "$folder/$run")
  "$trainer" "${options[@]}" --output "$folder/$run" --resume >>"$folder/$run.log" 2>&1 &
  pid=$!
  while [ "$(records "$folder/$run")" -lt $((before + more)) ] && kill -0 "$pid" 2>/dev/null; do sleep 0.01; done
  sleep "0.0$((RANDOM % 10))"
  kill "-$signal" "$pid" 2>/dev/null || true
  sleep 0.005
  kill "-$signal" "$pid" 2>/dev/null || true
  local code=0
  wait "$pid" || code=$?
  echo "$code"
}

"$trainer" "${options[@]}" --output "$folder/alone" >"$folder/alone.log"

killed=0
for more in 0 1 2 1 3; do
  [ "$(stopped killed KILL "$more")" != 137 ] || killed=$((killed + 1))
done
[ "$killed" -ge 2 ] || fail "only $killed of 5 kills found the run alive"
"$trainer" "${options[@]}" --output "$folder/killed" --resume >>"$folder/killed.log"
grep -q 'resumed from step [1-9]' "$folder/killed.log" || fail "no run went on from a checkpoint"
same_end killed

for signal in INT TERM; do
  [ "$(stopped stopped "$signal" 2)" = $((128 + $(kill -l "$signal"))) ] || fail "SIG$signal did not end the run as it should"
  grep -q '"status": "interrupted"' "$folder/stopped/summary.json" || fail "the summary does not say interrupted"
  grep -q 'the same command with --resume goes on' "$folder/stopped.log" || fail "it does not say how to resume"
done
"$trainer" "${options[@]}" --output "$folder/stopped" --resume >>"$folder/stopped.log"
same_end stopped
echo "killed $killed times and interrupted twice: the same weights and records as the run that was left alone"
