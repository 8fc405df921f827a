#!/usr/bin/env python3
"""The tables of a study, ours beside the paper's: STUDY_DIR/tables.md, and pictures of each network.

Accuracies are means over the seeds +- their sample standard deviation. The gap recovered is that between large-batch
(0) and small-batch training (1) in test accuracy: (method - large-batch) / (sgd - large-batch). Settings are learning
rate η, strength λ, size of the batches |B| or micro-batches |M|; the micro-batch gradient norm is squared.
"""

import argparse
import pathlib
import statistics
import sys

from records import RecordError, read_run, read_summary
from study import Study

COLUMNS = ["method", "setting", "seeds", "best validation (%)", "test at best (%)", "final validation (%)",
           "final micro-batch gradient norm", "gap recovered", "paper (%)", "paper's gap recovered"]
ENDS = ("sgd", "large-batch")  # of the gap


class Row:
    """One setting and its completed runs."""

    def __init__(self, setting, runs):
        self.setting = setting
        self.runs = runs
        self.chosen = False

    def values(self, name):
        """A figure of the summaries; the reference split has none on validation images."""
        return [run.summary[name] for run in self.runs if run.summary.get(name) is not None]

    @property
    def test(self):
        values = self.values("test_accuracy")
        return 100 * statistics.fmean(values) if values else None


def spread(values, factor=1.0, digits=2):
    """mean +- sample standard deviation; the mean alone of one value; - of none."""
    values = [factor * value for value in values]
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def gap(value, small, large):
    """None where a figure is missing or there is no gap to recover."""
    if value is None or small is None or large is None or small <= large:
        return None
    return (value - large) / (small - large)


def number(value):
    return "-" if value is None else f"{value:.2f}"


def setting_text(config):
    parts = [f"η {config['learning_rate']:g}"]
    if config.get("strength"):
        parts.append(f"λ {config['strength']:g}")
    plain = config["method"] in ENDS
    parts.append(f"|B| {config['batch_size']}" if plain else f"|M| {config['micro_batch_size']}")
    return ", ".join(parts)


def read_rows(study):
    """A row for each setting with completed runs, and a line for each run that is not completed or not readable."""
    rows, problems, damaged = [], [], False
    for setting in study.settings:
        folder, runs = study.setting_folder(setting), []
        for run_folder in sorted(folder.glob("seed-*")) if folder else []:
            try:
                status = read_summary(run_folder).get("status", "not ended")
                if status == "completed":
                    runs.append(read_run(run_folder))
                else:
                    problems.append(f"{run_folder.relative_to(study.folder)}: {status}")
            except RecordError as error:
                problems.append(str(error))
                damaged = True
        if runs:
            rows.append(Row(setting, runs))
    for row in rows:
        row.chosen = study.best(row.setting.network, row.setting.name) == row.setting
    return rows, list(dict.fromkeys(problems)), damaged


def table_of(rows, all_rows):
    """Lines of Markdown. The gap is taken to the network's sgd and large-batch."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    for row in rows:
        ends = {r.setting.name: r for r in all_rows if r.setting.network == row.setting.network and r.chosen}
        small, large = ends.get("sgd"), ends.get("large-batch")
        lines.append("| " + " | ".join([
            row.setting.name,
            setting_text(row.runs[0].config).replace("|", "\\|"),
            str(len(row.runs)),
            spread(row.values("best_validation_accuracy"), 100),
            spread(row.values("test_accuracy"), 100),
            spread(row.values("final_validation_accuracy"), 100),
            spread([run.metrics[-1]["micro_batch_gradient_norm"] for run in row.runs], digits=3),
            number(gap(row.test, small and small.test, large and large.test)),
            number(row.setting.paper),
            number(gap(row.setting.paper, small and small.setting.paper, large and large.setting.paper)),
        ]) + " |")
    return lines


def document(study, rows, problems):
    lines = ["# Tables", "", *__doc__.strip().split("\n\n", 1)[1].replace("+-", "±").split("\n"), *study.notes]
    for table in study.tables:
        for network in dict.fromkeys(setting.network for setting in study.settings):
            ours = [r for r in rows if table in r.setting.tables and r.setting.network == network]
            chosen = [r for r in ours if r.chosen]
            own = [r for r in ours if r.setting.tables[0] == table]  # not the ends of the gap that every table has
            if not own:
                continue
            if chosen:
                lines += ["", f"## {table}: {network}", "", *table_of(chosen, rows)]
            names = [r.setting.name for r in own]
            several = [r for r in own if names.count(r.setting.name) > 1]
            if several:
                lines += ["", "The settings tried; the table above has the best of each method on validation:", "",
                          *table_of(several, rows)]
    if problems:
        lines += ["", "## Not completed, and left out", "", *(f"- {problem}" for problem in problems)]
    return "\n".join(lines) + "\n"


def draw(study, rows):
    try:
        import plot
    except SystemExit:
        print("no pictures: matplotlib is missing; python3 -m pip install matplotlib, then tables.py again")
        return
    for network in dict.fromkeys(row.setting.network for row in rows):
        ours = [row for row in rows if row.setting.network == network]
        folder = study.folder / "plots" / network
        # Settings shared by several names are drawn once.
        unique = lambda chosen: plot.group_runs({run.folder: run for row in chosen for run in row.runs}.values())
        chosen = [row for row in ours if row.chosen]
        main = [row for row in chosen if study.tables[0] in row.setting.tables]
        grafting = [row for row in chosen if "grafting" in row.setting.tables]
        pictures = {"training": plot.training(unique(main or chosen)), "cost": plot.cost(unique(main + grafting)),
                    "micro-batch-size": plot.micro_batch_size(unique(ours))}
        if any(row.setting.name not in ENDS for row in grafting):
            pictures["training-grafting"] = plot.training(unique(grafting))
        for name, figure in pictures.items():
            if figure is not None:
                plot.save(figure, folder / f"{name}.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, metavar="STUDY_DIR")
    folder = parser.parse_args().folder
    if not (folder / "study.txt").exists():
        sys.exit(f"error: {folder} holds no study.txt; name the --output of reproduce.sh")
    study = Study(folder / "study.txt", folder)
    rows, problems, damaged = read_rows(study)
    text = document(study, rows, problems)
    (folder / "tables.md").write_text(text)
    print(text)
    print(f"wrote {folder / 'tables.md'}")
    draw(study, rows)
    sys.exit(damaged)


if __name__ == "__main__":
    main()
