#!/usr/bin/env bash
# What benchmarks/gpu/prepare.sh laid out, run on a machine with a GPU and a Python that has the same torch:
#
#     benchmarks/gpu/run_gpu_checks.sh OUTPUT_FOLDER [STAGE...]
#
# Stages, all by default, in this order: machine programs cuda device ceilings bfloat16 float32 tf32 training. "processor"
# is one more, the tests on the CPU of that machine. Each has a time limit of its own, together 480 s, and leaves its
# results in the folder when it ends; benchmarks/gpu/report.py makes docs/gpu.md of them. Where programs do not load, they
# are built first (build_there.sh), which may take 220 s more.
set -uo pipefail
case "${1:---help}" in
  -h | --help)
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit
    ;;
esac
mkdir -p "$1"
out="$(cd "$1" && pwd)"
shift
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
carry="$root/build/gpu/carry"
bin="$carry/bin"
stages=("$@")
[ "${#stages[@]}" -gt 0 ] || stages=(machine programs cuda device ceilings bfloat16 float32 tf32 training)

libraries="$(python3 -c 'import torch, os; print(os.path.join(torch.__path__[0], "lib"))')" ||
  { echo "error: python3 cannot import torch" >&2; exit 1; }
export LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export MICROREG_TESTS_DIR="$root/tests"
# One test program for each of these processors at most.
cores="$(nproc)"

# Tests what its input names, one name a line, in a process for each, so that none ends with another, and several at a
# time: "each FOLDER BEFORE AFTER [VARIABLE=VALUE]..." runs BEFOREnameAFTER and keeps all output in that folder.
each() {
  local folder="$out/$1" before="$2" after="$3"
  shift 3
  mkdir -p "$folder"
  sed 's/,/\\,/g' | tee "$folder.names" | xargs -d '\n' -P "$((cores * 3 / 4))" -I NAME \
    env OMP_NUM_THREADS=1 TORCH_SHOW_CPP_STACKTRACES=0 "$@" bash -c '
      text="$2/${1//[^A-Za-z0-9_]/-}"
      timeout 50 "$3" "$4$1$5" -# >"$text" 2>&1
      echo "exit status $?" >>"$text"' _ NAME "$folder" "$bin/microreg_tests" "$before" "$after"
}

# Of the outputs in such a folder makes FOLDER.txt, with a line for each, and FOLDER.tar.gz.
collect() {
  local text
  [ -d "$out/$1" ] || return 0
  while IFS= read -r text; do  # those that the stage's end left out have no output, and have not passed
    : >>"$out/$1/${text//[^A-Za-z0-9_]/-}"
  done <"$out/$1.names"
  rm "$out/$1.names"
  for text in "$out/$1"/*; do
    awk -v name="${text##*/}" '
      /^All tests passed|^test cases:|^assertions:|^No tests ran|^exit status/ { text = text " | " $0 }
      END { print name text }' "$text"
  done >"$out/$1.txt"
  tar -C "$out" -czf "$out/$1.tar.gz" --remove-files "$1"
  grep -v 'exit status 0$' "$out/$1.txt"
  echo "$(grep -c 'exit status 0$' "$out/$1.txt") of $(wc -l <"$out/$1.txt") pass"
}

# All but those of a device, and the thousands of steps that take minutes.
files() { (cd "$root/tests" && ls test_*.cpp) | sed 's/\.cpp$//' | grep -Ev "^test_(cuda|cuda_numbers|repeated_steps)\$"; }

# The machine, and what its torch is.
stage_machine() {
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
  grep -m1 'model name' /proc/cpuinfo
  nproc
  python3 -c 'import torch; print("torch", torch.__version__, "cudnn", torch.backends.cudnn.version())'
}

# Whether the programs that were brought load here. Those that do not are built.
stage_programs() {
  local program broken=()
  for program in microreg_tests penalty_overhead microreg_cifar; do
    "$bin/$program" --help >/dev/null 2>"$out/$program.txt" && rm "$out/$program.txt" && continue
    head -n 2 "$out/$program.txt"
    broken+=("$program")
  done
  if [ "${#broken[@]}" -gt 0 ]; then
    echo "building ${broken[*]}"
    "$root/benchmarks/gpu/build_there.sh" "$carry/include" "$bin" "${broken[@]}" 2>&1 | tail -n 20
  fi
}

# The tests that need a device, one case at a time; all others with their tensors there; and on the CPU of this machine.
stage_cuda() { "$bin/microreg_tests" --list-test-names-only "[cuda]" | each cuda '' ''; }
stage_device() { files | each device '[#' ']' MICROREG_TEST_DEVICE=cuda; }
stage_processor() { files | each processor '[#' ']'; }

# What the card can do: bytes copied, products multiplied.
stage_ceilings() { python3 "$root/benchmarks/gpu/ceilings.py"; }

# The overhead of a penalty in one precision: "overhead NAME [OPTION]..."; apart from that, with CUDA graphs; and where
# the time goes.
overhead() {
  local precision="$1" run graphs="--estimator exact-graph --estimator plain-graph --fused on --no-memory"
  shift
  run=("$bin/penalty_overhead" --device cuda --micro-batch 128 --penalty gradient_norm --no-sweep --seconds 1 "$@")
  "${run[@]}" --model resnet18_w64 --estimator exact --json "$out/overhead-$precision.json"
  "${run[@]}" --model resnet18_w64 $graphs --json "$out/overhead-graph-$precision.json"
  "${run[@]}" --model vit --model mlp --estimator exact $graphs --json "$out/overhead-others-$precision.json"
  "${run[@]}" --model resnet18_w64 --estimator exact --layout channels_last --kernels >"$out/kernels-$precision.txt"
}
stage_bfloat16() { overhead bfloat16 --tf32 --autocast bfloat16; }
# Differences in full float32 alone: in coarser types they are refused. And the authors' formula in Python.
stage_float32() {
  overhead float32 --estimator forward-frozen
  python3 "$root/benchmarks/gpu/authors.py" --seconds 3 --json "$out/authors-float32.json"
}
stage_tf32() {
  overhead tf32 --tf32
  python3 "$root/benchmarks/gpu/authors.py" --seconds 3 --tf32 --json "$out/authors-tf32.json"
}

# The trainer, at the paper's size of network and batch, for as many steps as there is time.
stage_training() {
  local data=synthetic method
  [ ! -e "$carry/cifar10" ] || data="$carry/cifar10"
  for method in large-batch gradient-norm; do
    timeout 30 "$bin/microreg_cifar" --data "$data" --device cuda --model resnet18 --method "$method" \
      --batch-size 1280 --micro-batch-size 128 --steps 60 --log-every 20 --seed 1 --output "$out/training-$method" \
      --checkpoint-every 0 --overwrite 2>&1 | tail -n 8
    rm -f "$out/training-$method"/*checkpoint*
  done
}

declare -A limit=([machine]=15 [programs]=220 [cuda]=40 [device]=60 [processor]=200 [ceilings]=15
  [bfloat16]=85 [float32]=95 [tf32]=100 [training]=65)
for stage in "${stages[@]}"; do
  echo "== $stage"
  start="$(date +%s)"
  # In process groups of their own, so that all of a stage ends with it.
  set -m
  "stage_$stage" >"$out/$stage.txt" 2>&1 &
  worker=$!
  { sleep "${limit[$stage]}" && echo "stopped after ${limit[$stage]} s" >>"$out/$stage.txt" && kill -TERM -- "-$worker"; } &
  watch=$!
  set +m
  wait "$worker"
  kill -TERM -- "-$watch" 2>/dev/null
  cat "$out/$stage.txt"
  collect "$stage"
  echo "== $stage took $(($(date +%s) - start)) s"
done
