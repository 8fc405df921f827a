#!/usr/bin/env python3
"""Plots the rows of step_study: median error of each difference against its step.

    plot_steps.py steps.json steps.svg
"""

import json
import statistics
import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

rows = json.load(open(sys.argv[1]))
figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), sharex=True, sharey=True)
styles = {
    ("forward", "free"): ("tab:red", "--", "forward, free gates"),
    ("central", "free"): ("tab:orange", "--", "central, free gates"),
    ("forward", "frozen"): ("tab:blue", "-", "forward, frozen gates"),
    ("central", "frozen"): ("tab:green", "-", "central, frozen gates"),
}
for i, batch_norm in enumerate([False, True]):
    for j, dtype in enumerate(["float32", "float64"]):
        axis = axes[i][j]
        for (estimator, gates), (color, line, label) in styles.items():
            mine = [
                row
                for row in rows
                if (row["batch_norm"], row["dtype"], row["estimator"], row["gates"])
                == (batch_norm, dtype, estimator, gates)
            ]
            steps = sorted({row["relative_step"] for row in mine} - {0})
            median = {
                step: statistics.median(row["relative_error"] for row in mine if row["relative_step"] == step)
                for step in [0, *steps]
            }
            axis.loglog(steps, [median[step] for step in steps], line, color=color, label=label)
            if gates == "frozen":
                axis.axhline(median[0], color=color, linewidth=0.6, linestyle=":")
        axis.set_title(f"ReLU network {'with' if batch_norm else 'without'} BatchNorm, {dtype}", fontsize=10)
        axis.grid(alpha=0.3)
axes[0][0].legend(fontsize=8)
figure.supxlabel("step / norm of the parameters (dotted: error at the automatic step)", fontsize=10)
figure.supylabel("relative error against double backward (median over networks)", fontsize=10)
figure.tight_layout()
figure.savefig(sys.argv[2])
