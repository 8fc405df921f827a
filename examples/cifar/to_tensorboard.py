#!/usr/bin/env python3
"""Writes the records of runs of microreg_cifar as TensorBoard event files, into RUN_DIR/tensorboard:

    to_tensorboard.py runs/*/ && tensorboard --logdir runs
"""

import argparse
import pathlib
import sys

from records import RecordError, read_run

try:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
except ImportError:
    sys.exit("error: the tensorboard package is not installed; python3 -m pip install tensorboard")


def export(folder):
    """Replaces what an earlier call wrote; a run that goes on can be exported again and again."""
    run = read_run(folder)
    target = run.folder / "tensorboard"
    for old in target.glob("events.out.tfevents.*"):
        old.unlink()
    # The records count seconds from the start; the last one was written when the file was last changed.
    start = (run.folder / "metrics.jsonl").stat().st_mtime - run.metrics[-1].get("seconds", 0)
    writer = EventFileWriter(str(target))
    for record in run.metrics:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in record.items()
                  if name != "step" and isinstance(value, (int, float))]
        writer.add_event(Event(wall_time=start + record.get("seconds", 0), step=record["step"],
                               summary=Summary(value=values)))
    writer.close()
    print(f"wrote {len(run.metrics)} records to {target}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=pathlib.Path, metavar="RUN_DIR")
    failed = False
    for folder in parser.parse_args().runs:
        try:
            export(folder)
        except RecordError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
    sys.exit(failed)


if __name__ == "__main__":
    main()
