#!/usr/bin/env python3
"""The oracle of the C++ tests: every penalty's value and gradient, by Python's autograd in float64.

    generate.py FILE           writes the file that the C++ tests read
    generate.py --check FILE   derives everything anew and compares with FILE; exit status 77 if torch is missing

The formulas are written out here by hand, batch normalisation and losses included, from the definitions in
arXiv:2211.15853; nothing of the C++ library is used. For a mini-batch cut into micro-batches M,

    objective(w) = sum over M of weight(M) * (L_M(w) + strength * ||grad_w s_M(w)||^2),

is built as one scalar and differentiated. Format of FILE: a line "name dim dim ...", then a line of the values.
"""

import argparse
import sys

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    print("skipped: Python has no torch")
    sys.exit(77)

SAMPLES, MICRO_BATCH, CLASSES = 10, 4, 5  # micro-batches of 4, 4 and 2
DIRECTION_SEED = 11
STRENGTHS = {"gradient_norm": 0.3, "fisher_trace": 0.2, "average_jacobian": 0.05, "unit_jacobian": 0.4}


def uniform(generator, *shape, scale=1.0):
    return scale * (2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1)


def batch_norm(x, weight, bias):
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def mlp(w, x):
    return torch.tanh(x @ w["hidden.weight"].T + w["hidden.bias"]) @ w["output.weight"].T + w["output.bias"]


def cnn(w, x):
    for i in ("1", "2"):
        x = F.conv2d(x, w[f"conv{i}.weight"], w[f"conv{i}.bias"], padding=1)
        if f"norm{i}.weight" in w:
            x = batch_norm(x, w[f"norm{i}.weight"], w[f"norm{i}.bias"])
        x = torch.where(x > 0, x, torch.zeros_like(x))
        if i == "1":
            x = F.max_pool2d(x, 2)
    return x.mean((2, 3)) @ w["output.weight"].T + w["output.bias"]


def cross_entropy(logits, labels):
    log_p = logits - torch.log(torch.exp(logits).sum(1, keepdim=True))
    return -log_p[torch.arange(len(labels)), labels].mean()


def networks():
    g = torch.Generator().manual_seed(2211)
    conv = {
        "conv1.weight": uniform(g, 3, 2, 3, 3, scale=0.5),
        "conv1.bias": uniform(g, 3, scale=0.2),
        "conv2.weight": uniform(g, 4, 3, 3, 3, scale=0.5),
        "conv2.bias": uniform(g, 4, scale=0.2),
        "output.weight": uniform(g, CLASSES, 4),
        "output.bias": uniform(g, CLASSES, scale=0.2),
    }
    norm = {
        "norm1.weight": 1 + uniform(g, 3, scale=0.3),
        "norm1.bias": uniform(g, 3, scale=0.3),
        "norm2.weight": 1 + uniform(g, 4, scale=0.3),
        "norm2.bias": uniform(g, 4, scale=0.3),
    }
    dense = {
        "hidden.weight": uniform(g, 7, 6),
        "hidden.bias": uniform(g, 7),
        "output.weight": uniform(g, CLASSES, 7),
        "output.bias": uniform(g, CLASSES),
    }
    images = uniform(g, SAMPLES, 2, 6, 6, scale=1.5)
    return {
        "mlp": (mlp, dense, uniform(g, SAMPLES, 6, scale=1.5)),
        "cnn": (cnn, conv, images),
        "cnn_batch_norm": (cnn, {**conv, **norm}, images),
    }


def squared_norm(scalar, parameters):
    gradients = torch.autograd.grad(scalar, parameters, create_graph=True, allow_unused=True)
    return sum((g**2).sum() for g in gradients if g is not None)


def derive():
    out = {}
    g = torch.Generator().manual_seed(15853)
    targets = torch.randint(CLASSES, (SAMPLES,), generator=g)
    drawn = torch.randint(CLASSES, (SAMPLES,), generator=g)
    directions_from = torch.Generator().manual_seed(DIRECTION_SEED)
    count = (SAMPLES + MICRO_BATCH - 1) // MICRO_BATCH
    directions = []
    for _ in range(count):
        normal = torch.empty(CLASSES, dtype=torch.float64).normal_(0, 1, generator=directions_from)
        directions.append(normal / torch.sqrt((normal**2).sum()))
    out["targets"], out["drawn"], out["directions"] = targets, drawn, torch.stack(directions)

    for network, (function, weights, data) in networks().items():
        weights = {name: value.clone().requires_grad_(True) for name, value in weights.items()}
        parameters = list(weights.values())
        out[f"{network}/data"] = data
        for name, value in weights.items():
            out[f"{network}/{name}"] = value.detach()
        for penalty, strength in STRENGTHS.items():
            losses, values = [], []
            for k in range(count):
                part = slice(k * MICRO_BATCH, min((k + 1) * MICRO_BATCH, SAMPLES))
                output = function(weights, data[part])
                loss = cross_entropy(output, targets[part])
                probe = {
                    "gradient_norm": lambda: loss,
                    "fisher_trace": lambda: cross_entropy(output, drawn[part]),
                    "average_jacobian": lambda: output.mean(0).sum(),
                    "unit_jacobian": lambda: (directions[k] * output.mean(0)).sum(),
                }[penalty]()
                losses.append(loss)
                values.append(squared_norm(probe, parameters))
            sizes = [min(MICRO_BATCH, SAMPLES - k * MICRO_BATCH) for k in range(count)]
            weightings = {"samples": [size / SAMPLES for size in sizes], "reference": [1 / count] * count}
            key = f"{network}/{penalty}"
            out[f"{key}/micro_batch_values"] = torch.stack(values).detach()
            for weighting, share in weightings.items():
                loss = sum(s * l for s, l in zip(share, losses))
                value = sum(s * v for s, v in zip(share, values))
                gradients = torch.autograd.grad(loss + strength * value, parameters, retain_graph=True)
                out[f"{key}/{weighting}/loss"] = loss.detach()
                out[f"{key}/{weighting}/value"] = value.detach()
                for name, gradient in zip(weights, gradients):
                    out[f"{key}/{weighting}/grad/{name}"] = gradient
    return out


def write(path, tensors):
    with open(path, "w") as file:
        for name, tensor in tensors.items():
            print(" ".join([name, *map(str, tensor.shape)]), file=file)
            print(" ".join(repr(value) for value in tensor.flatten().tolist()), file=file)


def read(path):
    lines = open(path).read().splitlines()
    tensors = {}
    for head, values in zip(lines[::2], lines[1::2]):
        name, *shape = head.split(" ")
        data = [float(value) for value in values.split()]
        tensors[name] = torch.tensor(data, dtype=torch.float64).reshape([int(size) for size in shape])
    return tensors


def check(path, derived):
    stored = read(path)
    if list(stored) != list(derived):
        print(f"{path} does not hold the tensors that this script derives; write it anew")
        return 1
    def difference(name):
        expected = derived[name].double()
        return ((stored[name] - expected).norm() / (expected.norm() + 1e-8)).item()

    worst = max((difference(name), name) for name in derived)
    print(f"{len(derived)} tensors, largest relative difference {worst[0]:.2g} ({worst[1]})")
    return 0 if worst[0] < 1e-10 else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.check:
        sys.exit(check(arguments.file, derive()))
    write(arguments.file, derive())
