#!/usr/bin/env python3
"""The oracle of the C++ tests: every penalty's value and gradient, by Python's autograd in float64.

    generate.py FILE           writes the file that the C++ tests read
    generate.py --check FILE   derives everything anew and compares with FILE; exit status 77 if torch is missing

The formulas are written out here by hand, batch normalisation and losses included, from the definitions in
arXiv:2211.15853 and, beyond it, of docs/; nothing of the C++ library is used. For a mini-batch cut into micro-batches M,

    objective(w) = sum over M of weight(M) * (L_M(w) + strength * R_M(w)),   R_M the penalty,

is built as one scalar and differentiated. The weights are those of samples, for the paper's penalties also those of the
authors' code. Format of FILE: a line "name dim dim ...", then a line of the values.
"""

import argparse
import sys
from types import SimpleNamespace

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    print("skipped: Python has no torch")
    sys.exit(77)

SAMPLES, MICRO_BATCH, CLASSES = 10, 4, 5  # micro-batches of 4, 4 and 2
DIRECTION_SEED = 11
DRAWS = 2  # of labels, directions and projections, where there are several


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


def gradient(scalar, tensors):
    """d(scalar)/d(tensors) as one vector with a graph."""
    gradients = torch.autograd.grad(scalar, tensors, create_graph=True, allow_unused=True)
    return torch.cat([g.flatten() for g in gradients if g is not None])


def squared_norm(scalar, tensors):
    return (gradient(scalar, tensors) ** 2).sum()


def exact_fisher_trace(output, parameters):
    """tr(F) / N by the Fisher information of the logits, diag(p) - p p^T: J the Jacobian of one sample's logits,

        tr(F) / N = 1 / N^2 * sum over samples of tr(J^T (diag(p) - p p^T) J).

    The distribution of the labels is held constant, as it is where labels are drawn.
    """
    total = 0
    for logits in output:
        p = torch.softmax(logits, 0).detach()
        jacobian = torch.stack([gradient(logit, parameters) for logit in logits])
        total = total + ((torch.diag(p) - torch.outer(p, p)) * (jacobian @ jacobian.T)).sum()
    return total / len(output) ** 2


def projected_input_jacobian(output, x, directions):
    """Mean over x of C ||v^T df/dx||^2, v on the unit sphere, averaged over `directions`."""
    scale = CLASSES / len(output) / len(directions)
    return scale * sum(squared_norm((output * v).sum(), [x]) for v in directions)


# name: (strength, weightings, R_M of one micro-batch). `m` has its output, loss, input x and parameters w, labels drawn
# (one set and DRAWS of them), directions and projections.
PENALTIES = {
    "gradient_norm": (0.3, ["samples", "reference"], lambda m: squared_norm(m.loss, m.w)),
    "fisher_trace": (0.2, ["samples", "reference"], lambda m: squared_norm(cross_entropy(m.output, m.drawn), m.w)),
    "average_jacobian": (0.05, ["samples", "reference"], lambda m: squared_norm(m.output.mean(0).sum(), m.w)),
    "unit_jacobian": (0.4, ["samples", "reference"], lambda m: squared_norm(m.direction @ m.output.mean(0), m.w)),
    "fisher_trace_draws": (
        0.2,
        ["samples"],
        lambda m: sum(squared_norm(cross_entropy(m.output, y), m.w) for y in m.drawn_more) / DRAWS,
    ),
    "fisher_trace_exact": (0.2, ["samples"], lambda m: exact_fisher_trace(m.output, m.w)),
    "unit_jacobian_directions": (
        0.1,
        ["samples"],
        lambda m: CLASSES * sum(squared_norm(u @ m.output.mean(0), m.w) for u in m.directions) / DRAWS,
    ),
    "jacobian_norm": (0.1, ["samples"], lambda m: sum(squared_norm(f, m.w) for f in m.output.mean(0))),
    "input_jacobian_exact": (
        0.1,
        ["samples"],
        lambda m: sum(squared_norm(f, [m.x]) for f in m.output.sum(0)) / len(m.output),
    ),
    "input_jacobian_projections": (0.1, ["samples"], lambda m: projected_input_jacobian(m.output, m.x, m.projections)),
    "unsquared_gradient_norm": (0.3, ["samples"], lambda m: torch.sqrt(squared_norm(m.loss, m.w))),
}


def unit_vectors(generator, *shape):
    """On the unit sphere of the last dimension, drawn as the library draws them."""
    normal = torch.empty(*shape, dtype=torch.float64).normal_(0, 1, generator=generator)
    return normal / torch.sqrt((normal**2).sum(-1, keepdim=True))


def derive():
    out = {}
    g = torch.Generator().manual_seed(15853)
    targets = torch.randint(CLASSES, (SAMPLES,), generator=g)
    drawn = torch.randint(CLASSES, (SAMPLES,), generator=g)
    drawn_more = torch.randint(CLASSES, (DRAWS, SAMPLES), generator=g)
    parts = [slice(begin, min(begin + MICRO_BATCH, SAMPLES)) for begin in range(0, SAMPLES, MICRO_BATCH)]
    sizes = [part.stop - part.start for part in parts]
    shares = {"samples": [size / SAMPLES for size in sizes], "reference": [1 / len(parts)] * len(parts)}
    new_generator = lambda: torch.Generator().manual_seed(DIRECTION_SEED)
    from_seed = new_generator()
    directions = [unit_vectors(from_seed, CLASSES) for _ in parts]
    from_seed = new_generator()
    directions_more = [[unit_vectors(from_seed, CLASSES) for _ in range(DRAWS)] for _ in parts]
    from_seed = new_generator()
    projections = [[unit_vectors(from_seed, size, CLASSES) for _ in range(DRAWS)] for size in sizes]
    out["targets"], out["drawn"], out["drawn_more"] = targets, drawn, drawn_more
    out["directions"] = torch.stack(directions)

    for network, (function, weights, data) in networks().items():
        weights = {name: value.clone().requires_grad_(True) for name, value in weights.items()}
        parameters = list(weights.values())
        out[f"{network}/data"] = data
        for name, value in weights.items():
            out[f"{network}/{name}"] = value.detach()
        micro_batches = []
        for k, part in enumerate(parts):
            x = data[part].clone().requires_grad_(True)
            output = function(weights, x)
            micro_batches.append(
                SimpleNamespace(
                    x=x,
                    w=parameters,
                    output=output,
                    loss=cross_entropy(output, targets[part]),
                    drawn=drawn[part],
                    drawn_more=drawn_more[:, part],
                    direction=directions[k],
                    directions=directions_more[k],
                    projections=projections[k],
                )
            )
        for penalty, (strength, weightings, value_of) in PENALTIES.items():
            values = [value_of(m) for m in micro_batches]
            key = f"{network}/{penalty}"
            out[f"{key}/micro_batch_values"] = torch.stack(values).detach()
            for weighting in weightings:
                loss = sum(s * m.loss for s, m in zip(shares[weighting], micro_batches))
                value = sum(s * v for s, v in zip(shares[weighting], values))
                gradients = torch.autograd.grad(loss + strength * value, parameters, retain_graph=True)
                out[f"{key}/{weighting}/loss"] = loss.detach()
                out[f"{key}/{weighting}/value"] = value.detach()
                for name, part in zip(weights, gradients):
                    out[f"{key}/{weighting}/grad/{name}"] = part
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


def quantities(tensors):
    """What is compared as a whole: a gradient over all of its parameters, any other tensor by itself. One parameter's
    part of a gradient may be zero in exact arithmetic, and is then nothing but rounding, other on each processor."""
    groups = {}
    for name in tensors:
        groups.setdefault(name.partition("/grad/")[0], []).append(name)
    return groups


def check(path, derived):
    stored = read(path)
    if list(stored) != list(derived):
        print(f"{path} does not hold the tensors that this script derives; write it anew")
        return 1

    def difference(names):
        found = torch.cat([stored[name].flatten() for name in names])
        expected = torch.cat([derived[name].double().flatten() for name in names])
        return ((found - expected).norm() / (expected.norm() + 1e-8)).item()

    compared = quantities(derived)
    worst, where = max((difference(names), quantity) for quantity, names in compared.items())
    print(f"{len(compared)} quantities, largest relative difference {worst:.2g} ({where})")
    return 0 if worst < 1e-10 else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.check:
        sys.exit(check(arguments.file, derive()))
    write(arguments.file, derive())
