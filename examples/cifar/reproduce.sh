#!/usr/bin/env bash
# Repeats tables of the paper with several seeds: sets up and builds the trainer, runs what is not complete yet, and
# writes OUTPUT/tables.md and pictures. Stop it at any time; the same command goes on where it was.
#
# Usage: reproduce.sh --scale paper|small [OPTION...] [-- TRAINER_OPTION...]
#
#   --table NAME[,NAME]    main, large-micro-batch (paper only), micro-batch-size, grafting or all [main]
#   --data DIR             folder with the official binary files [build/data, downloaded]
#   --output DIR           where the study goes [runs/SCALE]
#   --seeds "0 1 2"        [0 1 2]
#   --device NAME          as the trainer's [auto]
#   --jobs N               runs at once, each with an equal share of the cores [number of cores]
#   --small-batch-steps N  updates of the small-batch runs [as in studies/SCALE.txt]
#   --large-batch-steps N  updates of all others [as in studies/SCALE.txt]
#   --dry-run              print the commands only
#
# What is run stands in studies/paper.txt and studies/small.txt. TRAINER_OPTIONs go to every run. MICROREG_CIFAR names a
# trainer that is built already, MICROREG_PYTHON a Python (with matplotlib, for the pictures).
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
source "$here/../../cmake/bootstrap.sh"

usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; }
misuse() {
  printf 'error: %s; see --help\n' "$*" >&2
  exit 2
}

scale="" tables=main data="" output="" seeds="0 1 2" device=auto jobs="$(nproc)"
small_steps="" large_steps="" dry_run=""
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage; exit ;;
    --dry-run) dry_run=yes; shift; continue ;;
    --) shift; break ;;
    --scale | --table | --data | --output | --seeds | --device | --jobs | --small-batch-steps | --large-batch-steps)
      [ $# -ge 2 ] || misuse "$1 lacks its value" ;;
    *) misuse "unknown option $1" ;;
  esac
  case "$1" in
    --scale) scale="$2" ;;
    --table) tables="$2" ;;
    --data) data="$2" ;;
    --output) output="$2" ;;
    --seeds) seeds="$2" ;;
    --device) device="$2" ;;
    --jobs) jobs="$2" ;;
    --small-batch-steps) small_steps="$2" ;;
    --large-batch-steps) large_steps="$2" ;;
  esac
  shift 2
done
[[ "$scale" =~ ^(paper|small)$ ]] || misuse "--scale is '$scale'; it must be paper or small"
for number in "$jobs" ${small_steps:+"$small_steps"} ${large_steps:+"$large_steps"}; do
  [[ "$number" =~ ^[1-9][0-9]*$ ]] || misuse "'$number' is given for jobs or steps; it must be a whole number above 0"
done
[[ "${BASH_VERSINFO[0]}${BASH_VERSINFO[1]}" -ge 51 ]] || microreg_fail "bash is $BASH_VERSION; at least 5.1 is needed"
command -v "${MICROREG_PYTHON:=python3}" >/dev/null || microreg_fail "$MICROREG_PYTHON is not installed"

absolute() { case "$1" in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
output="$(absolute "${output:-$microreg_root/runs/$scale}")"
threads=$((jobs < $(nproc) ? $(nproc) / jobs : 1))

if [ -n "$dry_run" ]; then
  trainer="${MICROREG_CIFAR:-microreg_cifar}"
elif [ -n "${MICROREG_CIFAR:-}" ]; then
  trainer="$MICROREG_CIFAR"
else
  microreg_bootstrap
  microreg_build microreg_cifar
  trainer="$microreg_build_dir/examples/cifar/microreg_cifar"
fi
if [ -z "$data" ]; then
  data="$microreg_root/build/data"
  if [ -z "$dry_run" ]; then
    "$here/download.sh" cifar10 "$data"
    [ "$scale" = small ] || "$here/download.sh" cifar100 "$data"
  fi
fi

[[ "$output$data" != *[[:space:]]* ]] || misuse "--output and --data must be without spaces"

# The study as it is run, later lines replace earlier ones. It is kept with the runs, so that no others mix in.
temporary="$(mktemp)"
trap 'rm -f "$temporary"' EXIT
{
  cat "$here/studies/$scale.txt"
  echo
  echo "options all --data $(absolute "$data") $*"
  [ -z "$small_steps" ] || echo "options small-batch --steps $small_steps"
  [ -z "$large_steps" ] || echo "options large-batch --steps $large_steps"
} >"$temporary"
if [ -e "$output/study.txt" ]; then
  diff "$output/study.txt" "$temporary" >&2 ||
    microreg_fail "$output holds a study with other settings (the lines above);
choose another --output, or remove $output/study.txt if its runs are still the ones wanted"
fi
declare -A running=()  # process: folder
failed=()
stop() {
  trap '' INT TERM
  [ ${#running[@]} -eq 0 ] || kill "${!running[@]}" 2>/dev/null || true
  wait
  microreg_fail "stopped; the same command goes on from here"
}
trap stop INT TERM

# Waits for one of the runs to end.
reap() {
  local process="" status=0
  wait -n -p process || status=$?
  local folder="${running[$process]}"
  unset "running[$process]"
  if [ $status -eq 0 ]; then
    microreg_say "done: ${folder#"$output"/}"
  else
    failed+=("$folder")
    microreg_say "FAILED (exit code $status): ${folder#"$output"/}: $(tail -n 1 "$folder/log.txt")"
  fi
}

run_phase() {
  local plan folder options
  plan="$("$MICROREG_PYTHON" "$here/study.py" "$temporary" "$output" --phase "$1" --tables "$tables" --seeds "$seeds")"
  if [ -z "$dry_run" ]; then
    mkdir -p "$output"
    cp "$temporary" "$output/study.txt"
  fi
  [ -n "$plan" ] || return 0
  microreg_say "The $1 phase: $(wc -l <<<"$plan") runs, $jobs at once"
  while IFS=$'\t' read -r folder options; do
    # shellcheck disable=SC2206  # options are words without spaces
    local -a command=("$trainer" $options --device "$device" --threads "$threads" --resume --output "$folder")
    if [ -n "$dry_run" ]; then
      echo "${command[*]}"
      continue
    fi
    while [ ${#running[@]} -ge "$jobs" ]; do reap; done
    mkdir -p "$folder"
    "${command[@]}" >>"$folder/log.txt" 2>&1 </dev/null &
    running[$!]="$folder"
  done <<<"$plan"
  while [ ${#running[@]} -gt 0 ]; do reap; done
}

run_phase first
run_phase second
[ -z "$dry_run" ] || exit 0

status=0
echo
"$MICROREG_PYTHON" "$here/tables.py" "$output" || status=1
if [ ${#failed[@]} -gt 0 ]; then
  printf 'error: %s failed; see its log.txt\n' "${failed[@]}" >&2
  status=1
fi
exit $status
