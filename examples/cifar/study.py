#!/usr/bin/env python3
"""Which runs a study still needs, one a line: folder, tab, options of microreg_cifar. For reproduce.sh.

    study.py STUDY_FILE STUDY_DIR --phase first|second --tables main,grafting --seeds "0 1 2"

The first phase is what stands alone, a search by its first seed only. The second is what follows from it: the best
setting of each search with every seed, and settings that take something over from another (@NAME).
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys

from records import RecordError, note, read_summary


@dataclasses.dataclass(frozen=True)
class Setting:
    """A line of a study file; studies/small.txt says what the columns are."""

    tables: tuple
    network: str
    name: str
    search: bool
    paper: float | None
    options: tuple  # of (option, value); the value of a flag is ""

    @property
    def follows(self):
        return any(value.startswith("@") for _, value in self.options)


def parse_options(words):
    options = {}
    for word in words:
        if word.startswith("--"):
            last = word
            options[last] = ""
        elif options:
            options[last] = word
        else:
            raise ValueError(f"'{word}' where an option was expected")
    return options


class Study:
    """A study file, and the folder with its runs: NETWORK/SETTING/seed-N."""

    def __init__(self, file, folder):
        self.folder = pathlib.Path(folder)
        self.common = []  # of (scope, options)
        self.settings = []
        self.notes = []  # for the head of the tables
        for number, line in enumerate(pathlib.Path(file).read_text().splitlines(), 1):
            words = line.split("#")[0].split()
            if not words:
                continue
            try:
                if words[0] == "note":
                    self.notes.append(" ".join(words[1:]))
                elif words[0] == "options":
                    self.common.append((words[1], parse_options(words[2:])))
                else:
                    tables, network, name, seeds, paper, *options = words
                    if seeds not in ("all", "search"):
                        raise ValueError(f"seeds is '{seeds}'; it must be all or search")
                    self.settings.append(
                        Setting(tuple(tables.split(",")), network, name, seeds == "search",
                                None if paper == "-" else float(paper), tuple(parse_options(options).items())))
            except (ValueError, IndexError) as error:
                sys.exit(f"error: {file}:{number}: {error}")
        self.tables = list(dict.fromkeys(table for setting in self.settings for table in setting.tables))

    def of_name(self, network, name):
        return [s for s in self.settings if (s.network, s.name) == (network, name)]

    def resolve(self, setting, seed=None):
        """The setting's own options, with @NAME filled in: as a learning rate, that of NAME's best setting; as a
        folder, that setting's run with this seed. None before there is one."""
        options = {}
        for option, value in setting.options:
            if value.startswith("@"):
                best = self.best(setting.network, value[1:])
                if best is None:
                    return None
                value = self.run_folder(best, seed) if option == "--norms-from" else dict(best.options)[option]
            options[option] = str(value)
        return options

    def ready(self, setting, seed):
        """Whether what it takes over is there: a best setting, and where norms are read that setting's run."""
        options = self.resolve(setting, seed)
        norms_from = options and options.get("--norms-from")
        try:
            return options is not None and (
                norms_from is None or read_summary(norms_from).get("status") == "completed")
        except RecordError:
            return False

    def setting_folder(self, setting):
        """Named by the setting's own options, so that tables which share a setting share its runs."""
        options = self.resolve(setting)
        if options is None:
            return None
        options.pop("--norms-from", None)  # follows from the seed
        name = "_".join(f"{option[2:]}-{value}".rstrip("-") for option, value in options.items())
        return self.folder / setting.network / name

    def run_folder(self, setting, seed):
        return self.setting_folder(setting) / f"seed-{seed}"

    def run_options(self, setting, seed):
        method = dict(setting.options)["--method"]
        scopes = ("all", "small-batch" if method == "sgd" else "large-batch", setting.network)
        options = {}
        for scope, common in self.common:
            if scope in scopes:
                options |= common
        return options | self.resolve(setting, seed) | {"--seed": str(seed)}

    def summaries(self, setting):
        """{seed: summary} of the runs that ended in one way or another."""
        folder = self.setting_folder(setting)
        found = {}
        for run in sorted(folder.glob("seed-*")) if folder else []:
            try:
                summary = read_summary(run)
            except RecordError as error:
                note(error)
                continue
            if summary:
                found[int(run.name.removeprefix("seed-"))] = summary
        return found

    def best(self, network, name):
        """The setting with the best mean validation accuracy, over the seeds that all settings of this name have
        completed. One of which a run diverged only counts where all did. None where no run is completed."""
        accuracies, diverged = {}, set()
        for setting in self.of_name(network, name):
            summaries = self.summaries(setting)
            completed = {
                seed: summary.get("best_validation_accuracy", summary.get("test_accuracy"))
                for seed, summary in summaries.items() if summary.get("status") == "completed"
            }
            if completed:
                accuracies[setting] = completed
            if any(summary.get("status") == "diverged" for summary in summaries.values()):
                diverged.add(setting)
        accuracies = {s: a for s, a in accuracies.items() if s not in diverged} or accuracies
        if not accuracies:
            return None
        common = set.intersection(*(set(completed) for completed in accuracies.values()))
        return max(accuracies, key=lambda setting: statistics.mean(
            accuracy for seed, accuracy in accuracies[setting].items() if seed in common or not common))


def plan(study, tables, seeds, phase):
    """Yields (setting, seed) for every run of the phase that can be started."""
    for setting in study.settings:
        if not set(setting.tables) & set(tables):
            continue
        label = f"{setting.network}/{setting.name}"
        if phase == "first":
            if not setting.follows:
                yield from ((setting, seed) for seed in (seeds[:1] if setting.search else seeds))
        elif setting.follows:
            ready = [seed for seed in seeds if study.ready(setting, seed)]
            if ready != seeds:
                missing = " ".join(str(seed) for seed in seeds if seed not in ready)
                note(f"{label}: seeds {missing} start once the run that they follow is completed")
            yield from ((setting, seed) for seed in ready)
        elif setting.search:
            best = study.best(setting.network, setting.name)
            if best is None and setting == study.of_name(setting.network, setting.name)[0]:
                note(f"{label}: all seeds of the best setting start once the search has been run")
            elif setting == best:
                yield from ((setting, seed) for seed in seeds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="STUDY_FILE")
    parser.add_argument("folder", metavar="STUDY_DIR")
    parser.add_argument("--phase", choices=["first", "second"], required=True)
    parser.add_argument("--tables", default="all", help="separated by commas")
    parser.add_argument("--seeds", default="0", help="separated by spaces")
    arguments = parser.parse_args()

    study = Study(arguments.file, arguments.folder)
    tables = study.tables if arguments.tables == "all" else arguments.tables.split(",")
    for table in tables:
        if table not in study.tables:
            sys.exit(f"error: there is no table {table}; the study has {', '.join(study.tables)}")
    try:
        seeds = list(dict.fromkeys(int(seed) for seed in arguments.seeds.split()))
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0:
        sys.exit(f"error: seeds are '{arguments.seeds}'; they must be whole numbers, at least 0, as in \"0 1 2\"")
    started = set()
    for setting, seed in plan(study, tables, seeds, arguments.phase):
        folder = study.run_folder(setting, seed)
        if folder in started or study.summaries(setting).get(seed, {}).get("status") == "completed":
            continue
        started.add(folder)
        options = study.run_options(setting, seed)
        print(folder, " ".join(f"{option} {value}".rstrip() for option, value in options.items()), sep="\t")


if __name__ == "__main__":
    main()
