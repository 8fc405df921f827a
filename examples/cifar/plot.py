#!/usr/bin/env python3
"""Pictures of runs of microreg_cifar, as PNG.

training          validation accuracy and micro-batch gradient norm over the steps, as the paper's first figure
micro-batch-size  test accuracy by the size of the micro-batches
cost              test accuracy by what a step costs, relative to a large-batch step where there is such a run

Runs that differ only in their seed are one line (mean, and shaded from the least to the greatest) or one row of points.
"""

import argparse
import itertools
import math
import pathlib
import statistics
import sys

from records import NOT_A_SETTING, RecordError, note, read_run

try:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit("error: matplotlib is not installed; python3 -m pip install matplotlib, then run plot.py again")

# Colours that stay apart for colour-blind readers (Okabe and Ito, wine for their yellow), and a marker for print.
STYLES = {
    "sgd": ("#000000", "o"),
    "large-batch": ("#7f7f7f", "s"),
    "gradient-norm": ("#0072b2", "^"),
    "fisher-trace": ("#d55e00", "v"),
    "average-jacobian": ("#009e73", "D"),
    "unit-jacobian": ("#cc79a7", "P"),
    "iterative-grafting": ("#e69f00", "X"),
    "external-grafting": ("#56b4e9", "<"),
    "normalized": ("#882255", ">"),
}
SHOWN = {"learning_rate": "learning rate", "strength": "strength", "micro_batch_size": "|M|", "batch_size": "|B|"}


def style_of(method):
    return STYLES.get(method, ("#444444", "*"))


def group_runs(runs):
    """Lists of runs of one setting, in the methods' order."""
    groups = {}
    for run in runs:
        groups.setdefault(run.setting, []).append(run)
    rank = {method: place for place, method in enumerate(STYLES)}
    return sorted(groups.values(), key=lambda group: rank.get(group[0].config["method"], len(rank)))


def labels_of(groups):
    """Each group's method, and what tells it from the other groups of that method."""
    labels = []
    for group in groups:
        config = group[0].config
        others = [g[0].config for g in groups if g[0].config["method"] == config["method"]]
        differ = [key for key in config
                  if key not in NOT_A_SETTING and any(other.get(key) != config[key] for other in others)]
        parts = [config["method"]] + [f"{SHOWN.get(key, key)} {config[key]}" for key in differ]
        labels.append(", ".join(parts) + f" ({len(group)} seed{'s'[:len(group) != 1]})")
    return labels


def accuracy_name(run):
    return "validation_accuracy" if "validation_accuracy" in run.metrics[0] else "test_accuracy"


def test_accuracies(group):
    return [100 * run.summary["test_accuracy"] for run in group if run.completed and "test_accuracy" in run.summary]


def training(groups, x="steps"):
    name, *others = {accuracy_name(run) for group in groups for run in group}
    if others:
        raise RecordError("some runs record validation_accuracy, others test_accuracy; plot them apart")
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    dashes = {}  # one method's settings share its colour
    for group, label in zip(groups, labels_of(groups)):
        config = group[0].config
        color, _ = style_of(config["method"])
        dash = next(dashes.setdefault(config["method"], itertools.cycle(["-", "--", ":", "-."])))
        scale = config["batch_size"] if x == "samples" else 1
        for axis, quantity, factor in ((axes[0], name, 100), (axes[1], "micro_batch_gradient_norm", 1)):
            by_step = [{record["step"]: factor * record.get(quantity, math.nan) for record in run.metrics}
                       for run in group]
            steps = sorted(set.intersection(*(set(values) for values in by_step)))
            values = [[of_run[step] for of_run in by_step] for step in steps]
            position = [scale * step for step in steps]
            axis.plot(position, [statistics.fmean(v) for v in values], color=color, linestyle=dash, label=label)
            axis.fill_between(position, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.2,
                              linewidth=0)
    for axis in axes:
        axis.set_xlabel("samples seen" if x == "samples" else "steps (updates of the weights)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{name.replace('_', ' ')} (%)")
    axes[1].set_ylabel("micro-batch gradient norm, squared")
    axes[1].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("Lines: mean over the seeds; shaded: from the least to the greatest", fontsize="medium")
    return figure


def best_by(groups, key):
    """For each key the group with the best mean validation accuracy; None as key leaves a group out."""
    best = {}
    for group in groups:
        scores = [run.validation_accuracy for run in group if run.completed]
        if scores and test_accuracies(group) and key(group) is not None:
            score = statistics.fmean(scores)
            if key(group) not in best or score > best[key(group)][0]:
                best[key(group)] = (score, group)
    return {k: group for k, (_, group) in best.items()}


def micro_batch_size(groups):
    """None where no method has completed runs of two sizes."""
    baselines = best_by(groups, lambda g: g[0].config["method"] if g[0].config["method"] in ("sgd", "large-batch")
                        else None)
    # Only penalties depend on the size of the micro-batch.
    best = best_by(groups, lambda g: (g[0].config["method"], g[0].config["micro_batch_size"])
                   if g[0].config.get("strength") else None)
    sizes_of = {}
    for method, size in sorted(best):
        sizes_of.setdefault(method, []).append(size)
    sizes_of = {method: sizes for method, sizes in sizes_of.items() if len(sizes) > 1}
    if not sizes_of:
        return None
    figure, axis = plt.subplots(figsize=(7, 4.8), layout="constrained")
    for method, group in baselines.items():
        axis.axhline(statistics.fmean(test_accuracies(group)), color=style_of(method)[0], linestyle="--",
                     label=f"{method} (mean)")
    for method, sizes in sizes_of.items():
        color, marker = style_of(method)
        values = [test_accuracies(best[method, size]) for size in sizes]
        axis.plot(sizes, [statistics.fmean(v) for v in values], color=color)
        axis.plot([size for size, v in zip(sizes, values) for _ in v], [a for v in values for a in v], color=color,
                  marker=marker, linestyle="none", label=method)
    axis.set_xscale("log", base=2)
    ticks = sorted(set().union(*sizes_of.values()))
    axis.set_xticks(ticks, [str(size) for size in ticks])
    axis.minorticks_off()
    axis.set_xlabel("micro-batch size |M| (samples)")
    axis.set_ylabel("test accuracy (%)")
    axis.set_title("Points: seeds; lines: their mean; of several settings the best on validation", fontsize="medium")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def cost(groups):
    """None where no run is completed."""
    groups = [group for group in groups if test_accuracies(group)]
    if not groups:
        return None
    seconds = [run.summary["seconds_per_step"] for group in groups if group[0].config["method"] == "large-batch"
               for run in group if run.completed]
    unit = statistics.fmean(seconds) if seconds else 1
    figure, axis = plt.subplots(figsize=(7, 5.4), layout="constrained")
    named = set()
    for group in groups:
        method = group[0].config["method"]
        color, marker = style_of(method)
        completed = [run for run in group if run.completed and "test_accuracy" in run.summary]
        axis.plot([run.summary["seconds_per_step"] / unit for run in completed],
                  [100 * run.summary["test_accuracy"] for run in completed],
                  color=color, marker=marker, linestyle="none", alpha=0.8,
                  label=None if method in named else method)
        named.add(method)
    axis.set_xscale("log")
    axis.set_xlabel("time of a step / time of a large-batch step" if seconds else "time of a step (s)")
    axis.set_ylabel("test accuracy (%)")
    axis.set_title("Points: seeds, each setting's checkpoint that is best on validation", fontsize="medium")
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"wrote {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("."), metavar="DIR",
                        help="where the pictures go [.]")
    parser.add_argument("--kind", choices=["all", "training", "micro-batch-size", "cost"], default="all")
    parser.add_argument("--x", choices=["steps", "samples"], default="steps", help="the axis of training [steps]")
    arguments = parser.parse_args()
    kinds = {"training": lambda groups: training(groups, arguments.x), "micro-batch-size": micro_batch_size,
             "cost": cost}
    try:
        groups = group_runs([read_run(folder) for folder in arguments.runs])
        for kind in kinds if arguments.kind == "all" else [arguments.kind]:
            figure = kinds[kind](groups)
            if figure is not None:
                save(figure, arguments.output / f"{kind}.png")
            elif arguments.kind == kind:
                raise RecordError(f"nothing to draw for {kind}: too few completed runs, or one micro-batch size only")
            else:
                note(f"no picture of {kind}: too few completed runs, or one micro-batch size only")
    except RecordError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
