#!/usr/bin/env bash
# What including microreg costs the compiler, in user seconds and peak memory, beside torch/torch.h alone.
#     benchmarks/compile_time.sh               median of 3 runs, at -O3 and at -O0
#     benchmarks/compile_time.sh --repeats N   of N runs
#     benchmarks/compile_time.sh --level -O0   at one level only
# All files are compiled in turn, then all again, so that a machine that slows down meanwhile slows all of them. Without
# precompiled headers. CXX chooses the compiler (g++). Keep the machine idle.
set -euo pipefail

repeats=3
levels=(-O3 -O0)
while [ $# -gt 0 ]; do
  case "$1" in
    --repeats) repeats="${2:-}" && shift ;;
    --level) levels=("${2:-}") && shift ;;
    -h | --help)
      sed -n '2,7s/^# \{0,1\}//p' "$0"
      exit
      ;;
    *)
      echo "error: unknown option $1; see --help" >&2
      exit 2
      ;;
  esac
  shift
done
if ! [[ "$repeats" =~ ^[1-9][0-9]*$ ]]; then
  echo "error: --repeats is '$repeats'; it must be a number, at least 1" >&2
  exit 2
fi

source "$(dirname "${BASH_SOURCE[0]}")/../cmake/bootstrap.sh"
microreg_require time=/usr/bin/time
microreg_bootstrap

# LibTorch's include folders and definitions, as CMake has found them.
compiler="${CXX:-g++}"
command="$(grep -m 1 '"command":.*/cmake/microreg\.cpp"' "$microreg_build_dir/compile_commands.json")" ||
  microreg_fail "$microreg_build_dir/compile_commands.json has no command for cmake/microreg.cpp"
read -r -a flags <<<"$(grep -oE -- '(-isystem [^ ]+|-DUSE_[^ ]+)' <<<"$command" | tr '\n' ' ')"
flags=(-std=c++20 "-I$microreg_root/include" "${flags[@]}")

work="$microreg_root/build/compile-time"
rm -rf "$work"
mkdir -p "$work"
cd "$work"

# pair N MODEL PENALTY: a function that takes a step of a model and a penalty that no other pair has.
pair() {
  cat <<END
at::Tensor step_$1(torch::nn::$2& model, const at::Tensor& x, const at::Tensor& y) {
  microreg::Regularizer regularizer(model, torch::nn::CrossEntropyLoss(), microreg::$3{}, {.strength = 0.01});
  return regularizer.backward(x, y).loss;
}
END
}
torch='#include <torch/torch.h>'
echo "$torch" >torch.cpp
{
  cat torch.cpp
  cat <<'END'
at::Tensor step(torch::nn::Sequential& model, const at::Tensor& x, const at::Tensor& y) {
  at::Tensor loss = torch::nn::CrossEntropyLoss()(model->forward(x), y);
  loss.backward();
  return loss;
}
END
} >plain.cpp
printf '%s\n#include <microreg/microreg.hpp>\n' "$torch" >unused.cpp
{ cat unused.cpp && pair 1 Sequential GradientNorm; } >one.cpp
{ cat one.cpp && pair 2 Linear FisherTrace && pair 3 Conv2d UnitJacobian; } >three.cpp
echo '#include <microreg/compiled.hpp>' >unit.cpp

# name: source, further options
cases=(
  "torch: torch.cpp"
  "plain: plain.cpp"
  "unused: unused.cpp"
  "header_only: one.cpp"
  "default_unused: unused.cpp -DMICROREG_COMPILED"
  "default: one.cpp -DMICROREG_COMPILED"
  "default_three: three.cpp -DMICROREG_COMPILED"
  "header_only_three: three.cpp"
  "unit: unit.cpp -DMICROREG_COMPILED"
)
for ((i = 1; i <= repeats; ++i)); do
  microreg_say "Run $i of $repeats"
  for level in "${levels[@]}"; do
    for case in "${cases[@]}"; do
      read -r -a arguments <<<"${case#*: }"
      /usr/bin/time -f "${case%%:*} $level %U %M" -a -o measured "$compiler" "${flags[@]}" "$level" "${arguments[@]}" \
        -c -o object.o || microreg_fail "$compiler does not compile $work/${arguments[0]}"
      tail -n 1 measured | awk '{ printf "   %-18s %s %7.1f s %6.2f GB\n", $1, $2, $3, $4 / 1e6 }'
    done
  done
done

echo
echo "$("$compiler" --version | head -n 1), $(nproc) cores, load $(cut -d ' ' -f 1 /proc/loadavg); median of $repeats"
for level in "${levels[@]}"; do
  awk -v level="$level" '
    function median(case_, field,    n, i, j, t, v) {
      n = count[case_]
      for (i = 1; i <= n; ++i) v[i] = value[case_, field, i]
      for (i = 2; i <= n; ++i) for (j = i; j > 1 && v[j - 1] > v[j]; --j) { t = v[j]; v[j] = v[j - 1]; v[j - 1] = t }
      return n % 2 ? v[(n + 1) / 2] : (v[n / 2] + v[n / 2 + 1]) / 2
    }
    function row(text, case_, target) {
      printf "%-58s %7.1f s %6.2f GB %6.2f x  %s\n", text, median(case_, 1), median(case_, 2) / 1e6,
        median(case_, 1) / median("torch", 1), target
    }
    function further(text, one, three, target) {
      printf "%-58s %7.1f s %6.2f GB %6.2f x  %s\n", text, (median(three, 1) - median(one, 1)) / 2,
        (median(three, 2) - median(one, 2)) / 2e6, (median(three, 1) - median(one, 1)) / 2 / median("torch", 1), target
    }
    $2 == level { ++count[$1]; value[$1, 1, count[$1]] = $3; value[$1, 2, count[$1]] = $4 }
    END {
      printf "\n%-58s %9s %9s %8s  %s\n", level, "time", "memory", "ratio", "target"
      row("torch/torch.h alone", "torch", "")
      row("and a plain training step, without microreg", "plain", "")
      row("and microreg.hpp, unused, header-only", "unused", "")
      row("and microreg.hpp, unused, the default of CMake", "default_unused", "")
      row("and one Regularizer, header-only", "header_only", "at most 1.9 x")
      row("and one Regularizer, the default of CMake", "default", "at most 1.3 x, 1.6 GB")
      further("each further pair of model and penalty, header-only", "header_only", "header_only_three", "")
      further("each further pair of model and penalty, CMake", "default", "default_three", "at most 1 s")
      row("the compiled unit, once a program", "unit", "")
    }' measured
done
