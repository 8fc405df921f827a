#!/usr/bin/env python3
"""Makes docs/gpu.md of the folder that run_gpu_checks.sh wrote:  benchmarks/gpu/report.py FOLDER [--out docs/gpu.md]"""

import argparse
import json
import pathlib


def precision_of(file):
    return "bfloat16" if "bfloat16" in file.name else "TF32" if "tf32" in file.name else "float32"


def text_of(folder, name):
    """The file's text without notes, which tell paths."""
    file = folder / name
    lines = file.read_text().splitlines() if file.exists() else []
    return "\n".join(line for line in lines if not line.startswith("note:"))


def verdicts(text):
    """{file: what its run said}, of the lines that run_gpu_checks.sh makes of the tests' output."""
    result = {}
    for line in text.splitlines():
        name, *rest = line.split(" | ")
        passed = rest[-1:] == ["exit status 0"]
        result[name.replace("-", " ").strip()] = (passed, "; ".join(rest[:2]))
    return result


def tests(folder):
    lines = ["## Tests", ""]
    for stage, what in (("cuda", "cases of `microreg_tests \"[cuda]\"`, the tests of what only a device has, pass"),
                        ("processor", "files of tests pass on the processor of that machine"),
                        ("device", "files of tests pass with `MICROREG_TEST_DEVICE=cuda`, that is, with their tensors on the device")):
        found = verdicts(text_of(folder, f"{stage}.txt"))
        failed = {name: said for name, (passed, said) in found.items() if not passed}
        if found:
            lines += [f"{len(found) - len(failed)} of {len(found)} {what}.", ""]
            lines += [f"- {name}: {said}" for name, said in failed.items()] + [""] * bool(failed)
    return lines


def number(value, digits=2):
    return "-" if value is None else f"{value:.{digits}f}"


def overhead(folder):
    lines = ["## What a penalty costs", "",
             "One micro-batch of 128 images of 32x32, GradientNorm; time over the plain step just before it, memory over the",
             "plain step's by the caching allocator, and the distance of the penalty's part of the gradient to double",
             "backward by LibTorch alone.", "",
             "| network | precision | layout | estimator | plain ms | ratio | memory | error |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for file in sorted(folder.glob("overhead*.json")):
        precision = precision_of(file)
        for row in json.loads(file.read_text()):
            exact = row["estimator"].startswith("exact")
            how = row["estimator"] + (", fused" if exact and row["fused"] else ", stock" if exact else "")
            error = "-" if row["relative_error"] is None else f"{row['relative_error']:.1e}"
            cells = [row["model"], precision, row["layout"], how, number(row["plain_ms"]), number(row["ratio"]),
                     number(row["peak_memory_ratio"]), error]
            lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "The authors' formula in Python, on ResNet-18 of width 64:", "",
              "| precision | layout | plain ms | authors ms | ratio |", "| --- | --- | --- | --- | --- |"]
    for file in sorted(folder.glob("authors*.json")):
        for row in json.loads(file.read_text()):
            lines.append(f"| {precision_of(file)} | {row['layout']} | {number(row['plain_ms'])} | "
                         f"{number(row['authors_ms'])} | {number(row['ratio'])} |")
    return lines + [""]


def kernels(folder):
    lines = []
    for file in sorted(folder.glob("kernels-*.txt")):
        text = file.read_text().strip()
        if not text:
            continue
        lines += [f"### {precision_of(file)}, channels last", "", "```text"]
        shown = 0
        for line in text.splitlines():
            shown = 0 if line[:1] != " " else shown + 1
            lines += [line] if shown <= 8 else []
        lines += ["```", ""]
    return ["## Where the time goes", "", "The longest kernels of one step of ResNet-18 of width 64, exact.", ""] + lines if lines else []


def block(title, text):
    return [f"## {title}", "", "```text", text.strip(), "```", ""] if text.strip() else []


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/gpu.md"))
    options = parser.parse_args()
    folder = options.folder
    lines = ["# On a GPU", "", "Made by `benchmarks/gpu/report.py` of what `benchmarks/gpu/run_gpu_checks.sh` wrote, with",
             "programs that `benchmarks/gpu/prepare.sh` had built on a machine without a GPU.", ""]
    lines += block("The machine", text_of(folder, "machine.txt"))
    lines += block("What the card can do", text_of(folder, "ceilings.txt"))
    lines += tests(folder)
    lines += overhead(folder)
    lines += kernels(folder)
    lines += block("A short training", text_of(folder, "training.txt"))
    lines += [(pathlib.Path(__file__).parent / "notes.md").read_text()]
    options.out.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
