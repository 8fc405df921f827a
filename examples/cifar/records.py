"""Reads the records that microreg_cifar writes into the folder of a run: config.json, metrics.jsonl, summary.json."""

import dataclasses
import json
import pathlib
import sys

# What differs between runs of one setting: all that decides nothing, or only the random numbers.
NOT_A_SETTING = ("seed", "output", "norms_from", "threads", "workers")


class RecordError(Exception):
    """Records that are missing or damaged; the message names the file and the remedy."""


@dataclasses.dataclass
class Run:
    folder: pathlib.Path
    config: dict
    metrics: list  # one dict a logged step
    summary: dict  # empty while the run goes on

    @property
    def completed(self):
        return self.summary.get("status") == "completed"

    @property
    def validation_accuracy(self):
        """What settings are compared by; with the reference split, which has no validation images, test accuracy."""
        return self.summary.get("best_validation_accuracy", self.summary.get("test_accuracy"))

    @property
    def setting(self):
        """Equal for runs that differ in no more than the seed."""
        return json.dumps({k: v for k, v in self.config.items() if k not in NOT_A_SETTING}, sort_keys=True)


def note(message):
    print(f"note: {message}", file=sys.stderr)


def _read_object(path):
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}; is {path.parent} the --output of a run?") from None
    except ValueError as error:
        raise RecordError(f"{path}: not JSON ({error}); remove the folder and run again") from None
    if not isinstance(value, dict):
        raise RecordError(f"{path}: not a JSON object; remove the folder and run again")
    return value


def _read_metrics(path):
    try:
        lines = path.read_text().splitlines(keepends=True)
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}; is {path.parent} the --output of a run?") from None
    metrics = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["step"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines) and not line.endswith("\n"):
                note(f"{path}:{number}: half a line is skipped; the run goes on, or was cut off")
                break
            raise RecordError(f"{path}:{number}: not a record; remove the folder and run again") from None
        # JSON has no NaN: the trainer writes null.
        metrics.append({name: float("nan") if value is None else value for name, value in record.items()})
    return metrics


def read_summary(folder):
    """The summary of a run, or {} where there is none yet."""
    path = pathlib.Path(folder) / "summary.json"
    return _read_object(path) if path.exists() else {}


def read_run(folder):
    """The records of a run, finished or not. Throws RecordError."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise RecordError(f"{folder}: no such folder; name the --output of a run")
    config = _read_object(folder / "config.json")
    metrics = _read_metrics(folder / "metrics.jsonl")
    if not metrics:
        raise RecordError(f"{folder}: no record yet; wait for the run's first, or leave the folder out")
    return Run(folder, config, metrics, read_summary(folder))
