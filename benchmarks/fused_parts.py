"""What each part of FusedScope gains: the ratio of an exact step to a plain one, parts switched on one after the other.

    fused_parts.py build/release/benchmarks/penalty_overhead [--threads 1] [--seconds 2] [--repeats 3]

Which operations are fused is settled once in a process, so every entry is a process of its own, with plain and
penalised steps interleaved in it; entries take turns, and medians over the turns are printed.
"""

import argparse
import json
import statistics
import subprocess
import tempfile

PARTS = {
    "convolution": ["convolution_backward"],
    "normalisation": ["native_batch_norm_backward", "cudnn_batch_norm_backward", "native_layer_norm_backward",
                      "native_group_norm"],
    "activations": ["threshold_backward", "hardtanh_backward", "leaky_relu_backward"],
    "max pooling": ["max_pool2d_with_indices_backward", "max_pool3d_with_indices_backward"],
    "GELU": ["gelu_backward"],
    "softmax": ["_softmax_backward_data"],
}
NETWORKS = {  # the layouts, and the parts that there are in the network
    "resnet18_w16": (["nchw", "channels_last"], ["convolution", "normalisation", "activations"]),
    "vgg11": (["nchw", "channels_last"], ["convolution", "activations", "max pooling"]),
    "cnn": (["nchw", "channels_last"], ["convolution", "activations", "max pooling"]),
    "vit": (["nchw"], ["normalisation", "GELU", "softmax"]),
}


def ratio(arguments, model, layout, parts):
    operations = [operation for part in parts for operation in PARTS[part]]
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [arguments.program, "--model", model, "--layout", layout, "--penalty", "gradient_norm",
                   "--micro-batch", "32", "--estimator", "exact", "--fused", "on", "--no-memory", "--no-sweep",
                   "--fused-operations", ",".join(operations) or "none",
                   "--threads", str(arguments.threads), "--seconds", str(arguments.seconds), "--json", file.name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.load(file)[0]["ratio"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="the built penalty_overhead")
    parser.add_argument("--model", action="append", choices=NETWORKS, help="networks; default: all of them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2, help="time for an entry in a turn")
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    arguments = parser.parse_args()

    print("| network | layout | nothing | " + " | ".join("+ " + part for part in PARTS) + " |")
    print("| --- " * (3 + len(PARTS)) + "|")
    for model in arguments.model or NETWORKS:
        layouts, parts = NETWORKS[model]
        for layout in layouts:
            steps = [parts[:count] for count in range(len(parts) + 1)]
            turns = [[ratio(arguments, model, layout, step) for step in steps] for _ in range(arguments.repeats)]
            medians = [f"{statistics.median(column):.2f}" for column in zip(*turns)]
            cells = {part: median for part, median in zip(parts, medians[1:])}
            print(f"| {model} | {layout} | {medians[0]} | " + " | ".join(cells.get(part, "") for part in PARTS) + " |",
                  flush=True)


if __name__ == "__main__":
    main()
