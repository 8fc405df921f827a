#!/usr/bin/env python3
"""How near LibTorch's convolutions come to its matrix products: GFlop per second of CPU time, one thread.

    benchmarks/convolution_speed.py

3x3 convolutions as deep layers of a VGG have them, 32 images: the forward pass, the gradients by input and weight, and
the matrix product with as many multiplications.
"""

import statistics
import time

import torch
import torch.nn.functional as F

IMAGES = 32
LAYERS = ((128, 256, 8), (256, 256, 8), (256, 512, 4), (512, 512, 4), (512, 512, 2))  # channels in, out, side


def speed(operation, products):
    operation()
    times = []
    for _ in range(5):
        start = time.process_time()
        operation()
        times.append(time.process_time() - start)
    return 2e-9 * products / statistics.median(times)


def operations(channels, outputs, side, layout):
    images = torch.randn(IMAGES, channels, side, side).contiguous(memory_format=layout)
    weight = torch.randn(outputs, channels, 3, 3).contiguous(memory_format=layout)
    gradient = torch.randn(IMAGES, outputs, side, side).contiguous(memory_format=layout)
    patches = torch.randn(IMAGES * side * side, 9 * channels)
    matrix = torch.randn(9 * channels, outputs)

    def backward(of_input, of_weight):
        return torch.ops.aten.convolution_backward(
            gradient, images, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [of_input, of_weight, False]
        )

    return (
        lambda: F.conv2d(images, weight, padding=1),
        lambda: backward(True, False),
        lambda: backward(False, True),
        lambda: patches @ matrix,
    )


def main():
    torch.set_num_threads(1)
    print("| channels, map | layout | forward | input | weight | matrix product |\n| --- | --- | --- | --- | --- | --- |")
    for channels, outputs, side in LAYERS:
        for name, layout in (("NCHW", torch.contiguous_format), ("channels-last", torch.channels_last)):
            products = IMAGES * side * side * 9 * channels * outputs
            speeds = (speed(each, products) for each in operations(channels, outputs, side, layout))
            print(f"| {channels} to {outputs}, {side}x{side} | {name} |", " | ".join(f"{s:.0f}" for s in speeds), "|")


if __name__ == "__main__":
    main()
