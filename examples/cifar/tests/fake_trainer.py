#!/usr/bin/env -S python3 -I -S
"""Takes the options of microreg_cifar and writes made-up records in their format. FAKE_FAIL: a part of the folder names
of runs that are to fail. FAKE_LOG: a file that gets a line for each start."""

import json
import os
import pathlib
import sys

# Test accuracies in % of the seeds 0, 1 and 2.
ACCURACIES = {
    "sgd": (50, 52, 54),
    "large-batch": (40, 42, 44),
    "gradient-norm": (46, 50, 48),
    "fisher-trace": (51, 51, 51),
    "average-jacobian": (41, 43, 42),
    "unit-jacobian": (40, 42, 44),
    "iterative-grafting": (49, 50, 51),
    "external-grafting": (50, 50, 50),
    "normalized": (45, 46, 47),
}
# The settings that are best on validation; every other one is 10 points behind.
BEST = {
    "sgd": ("--learning-rate", "0.05"),
    "average-jacobian": ("--strength", "0.001"),
    "unit-jacobian": ("--strength", "0.1"),
    "normalized": ("--learning-rate", "0.2"),
}

words = sys.argv[1:]
options = {word: words[i + 1] if i + 1 < len(words) else "" for i, word in enumerate(words) if word.startswith("--")}
folder = pathlib.Path(options["--output"])
if "FAKE_LOG" in os.environ:
    with open(os.environ["FAKE_LOG"], "a") as log:
        print(" ".join(words), file=log)
if "--resume" not in words or os.environ.get("FAKE_FAIL", "\n") in str(folder):
    sys.exit("fake trainer: told to fail")

method, seed, rate = options["--method"], int(options["--seed"]), options["--learning-rate"]
strength = options.get("--strength", "0")
option, best = BEST.get(method, ("--method", method))
behind = 0 if options[option] == best else 10
test = (ACCURACIES[method][seed % 3] - behind) / 100
steps = int(options["--steps"])
norm = 12.0 if method == "large-batch" else 6.0 + seed

folder.mkdir(parents=True, exist_ok=True)
(folder / "config.json").write_text(json.dumps({
    "dataset": options["--dataset"], "model": options["--model"], "split": "holdout", "method": method,
    "strength": float(strength), "learning_rate": float(rate), "steps": steps, "seed": seed,
    "micro_batch_size": int(options["--micro-batch-size"]),
    "batch_size": int(options.get("--batch-size", options["--micro-batch-size"])),
    "norms_from": options.get("--norms-from", ""), "output": str(folder), "threads": int(options["--threads"])}))
with open(folder / "metrics.jsonl", "w") as metrics:
    for i in range(1, 21):
        print(json.dumps({
            "step": steps * i // 20, "train_loss": 2.3 / i, "gradient_norm": 1.0, "penalty": 0.1, "seconds": 0.5 * i,
            "validation_accuracy": (test + 0.01) * i / (i + 1) * 21 / 20, "micro_batch_gradient_norm": norm * i / 20}),
            file=metrics)
(folder / "summary.json").write_text(json.dumps({
    "status": "completed", "steps": steps, "best_validation_accuracy": test + 0.01,
    "final_validation_accuracy": test - 0.01, "best_step": steps, "test_accuracy": test, "seconds": 10.0,
    "seconds_per_step": 0.02 if method == "sgd" else 0.3 if method == "large-batch" else 0.9 + 0.02 * seed}))
