#!/usr/bin/env bash
# What benchmarks/gpu/prepare.sh laid out, run on a machine with a GPU and a Python that has the same torch:
#
#     benchmarks/gpu/run_gpu_checks.sh OUTPUT_FOLDER [STAGE...]
#
# Stages, all by default, in this order: machine programs tests ceilings benchmark training. Each has a time limit of its
# own, together 480 s, and leaves its results in the folder when it ends; benchmarks/gpu/report.py makes docs/gpu.md of
# them. Where programs do not load, they are built first (build_there.sh), which may take 220 s more.
set -uo pipefail
case "${1:---help}" in
  -h | --help)
    sed -n '2,8s/^# \{0,1\}//p' "$0"
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
[ "${#stages[@]}" -gt 0 ] || stages=(machine programs tests ceilings benchmark training)

libraries="$(python3 -c 'import torch, os; print(os.path.join(torch.__path__[0], "lib"))')" ||
  { echo "error: python3 cannot import torch" >&2; exit 1; }
export LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export MICROREG_TESTS_DIR="$root/tests"
# One test program for each of these processors at most.
cores="$(nproc)"

# One file of test cases after another, several at a time: "files PREFIX [VARIABLE=VALUE]... " writes PREFIX-NAME.txt.
files() {
  local prefix="$1"
  shift
  (cd "$root/tests" && ls test_*.cpp) | sed 's/\.cpp$//' | grep -Ev '^test_cuda(_numbers)?$' |
    xargs -P "$((cores / 2))" -I NAME sh -c '
      env OMP_NUM_THREADS=1 TORCH_SHOW_CPP_STACKTRACES=0 '"$*"' timeout 150 \
        '"$bin"'/microreg_tests "-#" "[#NAME]" >'"$out/$prefix"'-NAME.txt 2>&1
      echo "exit status $?" >>'"$out/$prefix"'-NAME.txt'
  tar -C "$out" -czf "$out/$prefix.tar.gz" --remove-files $(cd "$out" && ls "$prefix"-*.txt)
  for name in $(tar -tzf "$out/$prefix.tar.gz"); do
    tar -xzOf "$out/$prefix.tar.gz" "$name" | awk -v name="${name%.txt}" '
      /^All tests passed|^test cases:|^assertions:|^No tests ran|^exit status/ { text = text " | " $0 }
      END { print name text }'
  done >"$out/$prefix.txt"
}

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

# The tests that need a device; then all others, on the CPU of this machine and with their tensors on the device.
stage_tests() {
  timeout 100 "$bin/microreg_tests" "[cuda]" >"$out/cuda.txt" 2>&1
  tail -n 3 "$out/cuda.txt"
  files on-device MICROREG_TEST_DEVICE=cuda &
  files on-cpu
  wait
  grep -c 'All tests passed' "$out/on-cpu.txt" "$out/on-device.txt"
}

# What the card can do: bytes copied, products multiplied.
stage_ceilings() { python3 "$root/benchmarks/gpu/ceilings.py"; }

# The overhead of a penalty, with and without CUDA graphs, and the authors' formula in Python, on one network; then where
# the time goes. Differences only in full float32: in coarser types they are refused.
stage_benchmark() {
  local -A options=([float32]="--estimator forward-frozen --estimator exact-graph --estimator exact"
    [tf32]="--estimator exact-graph --estimator exact --tf32"
    [bfloat16]="--estimator exact-graph --estimator exact --tf32 --autocast bfloat16")
  local overhead=("$bin/penalty_overhead" --device cuda --micro-batch 128 --penalty gradient_norm --no-sweep --seconds 1)
  local precision
  for precision in float32 tf32 bfloat16; do
    timeout 60 "${overhead[@]}" --model resnet18_w64 ${options[$precision]} --json "$out/overhead-$precision.json"
    timeout 30 "${overhead[@]}" --model resnet18_w64 ${options[$precision]} --layout channels_last --kernels \
      >"$out/kernels-$precision.txt"
    [ "$precision" = bfloat16 ] ||
      timeout 30 python3 "$root/benchmarks/gpu/authors.py" ${options[$precision]##*exact} --json "$out/authors-$precision.json"
  done
  timeout 30 "${overhead[@]}" --model vit ${options[tf32]} --json "$out/overhead-vit-tf32.json"
}

# The trainer, at the paper's size of network and batch, for as many steps as there is time.
stage_training() {
  local data=synthetic method
  [ ! -e "$carry/cifar10" ] || data="$carry/cifar10"
  for method in large-batch gradient-norm; do
    timeout 40 "$bin/microreg_cifar" --data "$data" --device cuda --model resnet18 --method "$method" \
      --batch-size 1280 --micro-batch-size 128 --steps 60 --log-every 20 --seed 1 --output "$out/training-$method" \
      --checkpoint-every 0 --overwrite 2>&1 | tail -n 8
    rm -f "$out/training-$method"/*checkpoint*
  done
}

declare -A limit=([machine]=20 [programs]=220 [tests]=200 [ceilings]=30 [benchmark]=150 [training]=80)
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
  echo "== $stage took $(($(date +%s) - start)) s"
done
