#!/usr/bin/env python3
"""Draws benchmarks/results: plot.py RESULTS_FOLDER CHART.svg"""

import json
import pathlib
import sys

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

matplotlib.rcParams["svg.hashsalt"] = "microreg"  # the same figure, the same file
COLOURS = {"stock": "#b0b7c3", "fused": "#1f6f8b", "authors": "#d08c60"}
LIMIT = 3.0


def read(file):
    return json.loads(file.read_text()) if file.exists() else []


def label(row):
    return f"{row['model']}\n{'NHWC' if row['layout'] == 'channels_last' else 'NCHW'}"


def draw_ratios(axes, rows):
    """Exact gradient norm: one pair of bars for each network and layout."""
    rows = [row for row in rows if row["penalty"] == "gradient_norm" and row["estimator"] == "exact"]
    smallest = min(row["micro_batch"] for row in rows)
    rows = [row for row in rows if row["micro_batch"] == smallest]
    places = list(dict.fromkeys(label(row) for row in rows))
    for fused in (False, True):
        name = "fused" if fused else "stock"
        ratios = {label(row): row["ratio"] for row in rows if row["fused"] == fused}
        shift = 0.2 if fused else -0.2
        bars = axes.bar([i + shift for i, place in enumerate(places) if place in ratios],
                        [ratios[place] for place in places if place in ratios], 0.38, color=COLOURS[name],
                        label="microreg, fused double backward" if fused else "double backward by LibTorch alone")
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
    axes.set_ylim(0, 1.25 * max(row["ratio"] for row in rows))  # room for the legend
    axes.axhline(LIMIT, color="black", linewidth=0.8, linestyle="--")
    axes.text(len(places) - 0.5, LIMIT, " 3.0, the count\n of operations", fontsize=7, va="center")
    axes.set_xticks(range(len(places)), places, fontsize=7, rotation=45, ha="right")
    axes.set_ylabel("plain steps")
    axes.set_title(f"Exact gradient-norm step, micro-batch {smallest}", fontsize=10)
    axes.legend(fontsize=7, frameon=False)


def draw_growth(axes, rows):
    """Time and memory of a mini-batch as it grows at a fixed micro-batch."""
    rows = [row for row in rows if row["sweep"] == "batch"]
    sizes = [row["batch"] for row in rows]
    axes.plot(sizes, [row["relative_time"] for row in rows], "o-", color=COLOURS["fused"], label="time")
    if all(row["peak_memory_mb"] is not None for row in rows):
        first = rows[0]["peak_memory_mb"]
        axes.plot(sizes, [row["peak_memory_mb"] / first for row in rows], "s-", color=COLOURS["authors"],
                  label="peak memory")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sizes, sizes)
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.set_xlabel("mini-batch |B|")
    axes.set_ylabel(f"relative to |B| = {sizes[0]}")
    axes.set_title(f"Micro-batch {rows[0]['micro_batch']}, {rows[0]['model']}", fontsize=10)
    axes.legend(fontsize=7, frameon=False)


def draw_peers(axes, rows):
    """Our best layout against the authors' formula in Python."""
    rows = [row for row in rows if row["peer"] == "authors" and row["best_layout"]]
    bars = axes.bar(range(len(rows)), [row["speedup"] for row in rows], 0.6, color=COLOURS["authors"])
    axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(rows)), [row["model"] for row in rows], fontsize=7, rotation=45, ha="right")
    axes.set_ylabel("times as fast")
    axes.set_title("Against the authors' formula in Python", fontsize=10)


def main():
    results, chart = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    panels = [(draw_ratios, read(results / "penalty_overhead.json"), 3), (draw_growth, read(results / "sweeps.json"), 1.3),
              (draw_peers, read(results / "peers.json"), 1.3)]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        sys.exit(f"error: {results} holds no rows to draw")
    figure, axes = plt.subplots(1, len(panels), figsize=(3 + 3 * sum(p[2] for p in panels) / 1.5, 4), squeeze=False,
                                width_ratios=[panel[2] for panel in panels], layout="constrained")
    for ax, (draw, rows, _) in zip(axes[0], panels):
        draw(ax, rows)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(chart, metadata={"Date": None})


if __name__ == "__main__":
    main()
