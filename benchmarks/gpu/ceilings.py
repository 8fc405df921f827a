#!/usr/bin/env python3
"""What the card can do at best: bytes copied a second, and products in each precision. Medians of ten, after three."""

import statistics

import torch


def milliseconds(work):
    for _ in range(3):
        work()
    times = []
    for _ in range(10):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def main():
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    print(f"copy: {2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e9:.2f} TB/s, read and written")
    del source, target
    size = 8192
    for name, dtype, tf32 in (("float32", torch.float32, False), ("TF32", torch.float32, True),
                              ("bfloat16", torch.bfloat16, True), ("float16", torch.float16, True)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
        print(f"products in {name}: {2 * size**3 / milliseconds(lambda: a @ b) / 1e9:.0f} TFLOP/s")


if __name__ == "__main__":
    main()
