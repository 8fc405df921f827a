#!/usr/bin/env python3
"""Whether a convolution's second-order terms and its plain backward pass are faster as fewer, larger calls.

    benchmarks/concatenated_convolutions.py

Apart: conv(v, W) + conv(x, a), the backward pass of (gO, v, a) and that of (delta, x, W), whose input and weight
gradients are added up. Together: conv of [v, x] with [W; a], the input gradient of [delta, gO] with [W, a], the weight
gradient of both pairs as one batch. CPU time with one thread, medians over turns, for the layers of a ResNet of width 16.
"""

import statistics
import time

import torch


def backward(grad_output, x, weight, mask):
    return torch.ops.aten.convolution_backward(grad_output, x, weight, [0], [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
                                               mask)


def conv(x, weight):
    return torch.nn.functional.conv2d(x, weight, padding=1)


def apart(x, v, grad_output, delta, weight, a):
    """Second-order term of the output, input gradient, weight gradient."""
    output = conv(v, weight) + conv(x, a)
    first = backward(grad_output, v, a, [True, True, False])
    second = backward(delta, x, weight, [True, True, False])
    return output, first[0] + second[0], first[1] + second[1]


def together(x, v, grad_output, delta, weight, a):
    """The same three."""
    output = conv(torch.cat([v, x], 1), torch.cat([weight, a], 1))
    return (output, backward(torch.cat([delta, grad_output], 1), x, torch.cat([weight, a], 0), [True, False, False])[0],
            backward(torch.cat([delta, grad_output], 0), torch.cat([x, v], 0), weight, [False, True, False])[1])


def main():
    torch.set_num_threads(1)
    for layout in (torch.contiguous_format, torch.channels_last):
        for channels, size in ((16, 32), (32, 16), (64, 8), (128, 4)):
            shapes = [(32, channels, size, size)] * 4 + [(channels, channels, 3, 3)] * 2
            tensors = [torch.randn(shape).contiguous(memory_format=layout) for shape in shapes]
            for one, other in zip(apart(*tensors), together(*tensors)):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
            times = {apart: [], together: []}
            for _ in range(9):
                for way, list_of_times in times.items():
                    start = time.process_time()
                    way(*tensors)
                    list_of_times.append(1e3 * (time.process_time() - start))
            first, second = (statistics.median(each) for each in times.values())
            print(f"{str(layout)[6:]:<18} {channels:>3} channels, {size}x{size}: apart {first:.1f} ms, together "
                  f"{second:.1f} ms, {first / second:.2f}")


if __name__ == "__main__":
    main()
