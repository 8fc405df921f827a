#!/usr/bin/env python3
"""The plain step and the authors' gradient-norm step on ResNet-18 of width 64 in Python, on a CUDA device."""

import argparse
import json
import pathlib
import statistics
import sys
import time

import torch
from torch import nn

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "peers"))
import authors_formula  # noqa: E402
from networks import NETWORKS  # noqa: E402


def plain_step(model, loss_function, images, labels, strength):
    del strength
    model.zero_grad()
    loss_function(model(images), labels).backward()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tf32", action="store_true")
    parser.add_argument("--micro-batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
    rows = []
    for layout in ("nchw", "channels_last"):
        torch.manual_seed(1)
        model = NETWORKS["resnet18_w64"][0]().cuda()
        images = torch.randn(options.micro_batch, 3, 32, 32, device="cuda")
        labels = torch.randint(10, (options.micro_batch,), device="cuda")
        if layout == "channels_last":
            model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
        steps = {"plain": plain_step, "authors": authors_formula.step}
        times = {name: [] for name in steps}
        start = time.perf_counter()
        while len(times["plain"]) < 8 or time.perf_counter() - start < options.seconds / 2:
            for name, step in steps.items():
                torch.cuda.synchronize()
                begin = time.perf_counter()
                step(model, nn.functional.cross_entropy, images, labels, 1.0)
                torch.cuda.synchronize()
                times[name].append(1e3 * (time.perf_counter() - begin))
        warm = 3
        plain, authors = (statistics.median(times[name][warm:]) for name in ("plain", "authors"))
        ratio = statistics.median(a / b for a, b in zip(times["authors"][warm:], times["plain"][warm:]))
        print(f"Python, {layout}: plain {plain:.2f} ms, authors' formula {authors:.2f} ms, ratio {ratio:.2f}")
        rows.append({"layout": layout, "tf32": options.tf32, "micro_batch": options.micro_batch, "plain_ms": plain,
                     "authors_ms": authors, "ratio": ratio})
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
