#!/usr/bin/env python3
"""Our steps beside the formulas of public peers, on the same LibTorch build, weights, data and threads.

    benchmarks/peers/compare.py build/release/benchmarks/penalty_overhead [--json FILE]

The peers run in this process, in NCHW, the layout that their code uses. Ours run in processes that wait between orders,
one for each layout. Every round takes one step of each in turn; the table shows medians over the rounds. Where a peer's
formula promises our penalty exactly, the gradients' norms are compared too.

    --micro-batches 4 --workers 2   a step of four micro-batches, ours two at a time
    --best                          the authors' formula also in channels-last and with one thread: a row of its best
    --compile                       their formula on a model compiled by torch.compile, and torch.func compiled
"""

import argparse
import ctypes
import json
import math
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from torch import nn

import authors_formula
import finite_difference
import functional
import input_jacobian
from networks import NETWORKS


def plain_step(model, loss_function, images, labels, strength, weight=1):
    del strength
    loss = loss_function(model(images), labels)
    (loss * weight).backward()
    return loss.detach()


# name: (step, whether it computes what our gradient-norm step computes). Most take a weight, and so one micro-batch of
# several.
PEERS = {
    "plain": (plain_step, False),
    "authors": (authors_formula.step, True),
    "torch.func": (functional.Step(compiled=False), True),
    "finite_difference": (finite_difference.step, False),
    "input_jacobian": (input_jacobian.step, False),
}
OF_ONE_MICRO_BATCH = ("finite_difference", "input_jacobian")
AT_ONCE = {"torch.func, vmap": (functional.MicroBatchesAtOnce(), True)}
COMPILED = {
    "authors_compiled": (functional.CompiledModel(), True),
    "func_compiled": (functional.Step(compiled=True), True),
}
LAYOUTS = ("nchw", "channels_last")


class Ours:
    """A running benchmark program that takes one step an order."""

    def __init__(self, program, network, layout, arguments, state=""):
        command = [program, "--serve", "--model", network, "--layout", layout, "--penalty", "gradient_norm",
                   "--fused", "on", *arguments]
        if state:
            command += ["--state", state]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self.process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{' '.join(command)} did not start")

    def step(self, order):
        """Milliseconds, loss, norm of the gradient."""
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().split()
        if len(answer) != 3:
            raise RuntimeError(f"penalty_overhead --serve answered {answer}")
        return [float(number) for number in answer]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Theirs:
    """The network in Python, with the weights and the data that our program wrote."""

    def __init__(self, network, micro_batch, micro_batches, state, threads, channels_last=False):
        self.model = NETWORKS[network][0]()
        self.threads = threads
        self.micro_batch = micro_batch
        samples = micro_batch * micro_batches
        floats = torch.from_file(str(state), size=state.stat().st_size // 4, dtype=torch.float32)
        position = 0

        def take(shape):
            nonlocal position
            count = math.prod(shape)
            position += count
            return floats[position - count:position].reshape(shape).clone()

        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(take(parameter.shape))
        self.images = take((samples, 3, 32, 32))
        self.labels = floats[position:].clone().view(torch.int64)
        if self.labels.shape != (samples,):
            raise RuntimeError(f"{network}: the parameters in Python and in C++ do not have the same number of elements")
        if channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.loss_function = nn.CrossEntropyLoss()

    def step(self, name, step):
        torch.set_num_threads(self.threads)
        start = time.perf_counter()
        self.model.zero_grad()
        count = len(self.images) // self.micro_batch
        if name in AT_ONCE:
            loss = step(self.model, self.loss_function, self.images, self.labels, 1.0, self.micro_batch)
            return self.taken(start, loss)
        weight = () if name in OF_ONE_MICRO_BATCH else (1 / count,)
        loss = 0
        for images, labels in zip(self.images.split(self.micro_batch), self.labels.split(self.micro_batch)):
            loss = loss + step(self.model, self.loss_function, images, labels, 1.0, *weight) / count
        return self.taken(start, loss)

    def taken(self, start, loss):
        """Milliseconds since the start, loss, norm of the gradient."""
        milliseconds = 1e3 * (time.perf_counter() - start)
        squared = sum(float(p.grad.norm()) ** 2 for p in self.model.parameters() if p.grad is not None)
        return milliseconds, float(loss), math.sqrt(squared)


def keep_freed_memory():
    """As penalty_overhead --malloc tuned does."""
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_max = -1, -4
    return libc.mallopt(m_mmap_max, 0) == 1 and libc.mallopt(m_trim_threshold, -1) == 1


def check_same(network, what, ours, theirs, tolerance=2e-3):
    if not math.isclose(ours, theirs, rel_tol=tolerance):
        raise RuntimeError(f"{network}: the {what} is {ours} in C++ and {theirs} in Python")


def compare(program, network, options):
    threads = options.threads or torch.get_num_threads()
    arguments = ["--micro-batch", str(options.micro_batch), "--batch", str(options.micro_batch * options.micro_batches),
                 "--workers", str(options.workers), "--threads", str(threads), "--malloc", options.malloc]
    peers = {name: peer for name, peer in PEERS.items() if options.micro_batches == 1 or name not in OF_ONE_MICRO_BATCH}
    if options.micro_batches > 1:
        peers |= AT_ONCE
    if options.compile:
        peers |= COMPILED
    layouts = LAYOUTS if NETWORKS[network][1] else LAYOUTS[:1]
    with tempfile.TemporaryDirectory() as folder:
        state = pathlib.Path(folder) / "state"
        ours = {layout: Ours(program, network, layout, arguments, str(state) if layout == "nchw" else "")
                for layout in layouts}
        of_their_own = (options.micro_batch, options.micro_batches, state)
        theirs = Theirs(network, *of_their_own, threads)
        # What the authors' formula may choose: threads and layout.
        choices = {} if not options.best else {
            f"{count} threads, {layout}": Theirs(network, *of_their_own, count, layout == "channels_last")
            for count in sorted({1, threads}) for layout in layouts}
    try:
        # The warm-up, and that both compute the same.
        loss, norm = ours["nchw"].step("penalised")[1:]
        for layout in layouts:
            layout_loss, layout_norm = ours[layout].step("penalised")[1:]
            check_same(network, f"loss in {layout}", layout_loss, loss)
            check_same(network, f"gradient's norm in {layout}", layout_norm, norm)
        plain_loss, plain_norm = ours["nchw"].step("plain")[1:]
        for peer, (step, same) in list(peers.items()):
            try:
                their_loss, their_norm = theirs.step(peer, step)[1:]
            except Exception as error:  # torch.compile's and vmap's, of many kinds
                if peer in PEERS:
                    raise
                print(f"{network:<14}{peer}: {str(error).splitlines()[0]}", flush=True)
                del peers[peer]
                continue
            check_same(network, f"loss of {peer}", plain_loss, their_loss)
            if peer == "plain":
                check_same(network, "gradient's norm of a plain step", plain_norm, their_norm)
            if same:
                check_same(network, f"gradient's norm of {peer}", norm, their_norm)

        for choice in choices.values():
            choice.step("authors", authors_formula.step)
        times = {name: [] for name in (*peers, *layouts, *choices)}
        start = time.perf_counter()
        rounds = 0
        while rounds < options.rounds if options.rounds else rounds < 3 or time.perf_counter() - start < options.seconds:
            for layout in layouts:
                times[layout].append(ours[layout].step("penalised")[0])
            for peer, (step, _) in peers.items():
                times[peer].append(theirs.step(peer, step)[0])
            for name, choice in choices.items():
                times[name].append(choice.step("authors", authors_formula.step)[0])
            rounds += 1
    finally:
        for process in ours.values():
            process.close()

    best = min(layouts, key=lambda layout: statistics.median(times[layout]))
    rows = []
    compared = [peer for peer in peers if peer != "plain"]
    if choices:
        chosen = min(choices, key=lambda name: statistics.median(times[name]))
        times["authors_best"] = times[chosen]
        compared.append("authors_best")
    for peer in compared:
        for layout in layouts:
            rows.append({
                "model": network,
                "micro_batch": options.micro_batch,
                "peer": peer,
                "layout": layout,
                "best_layout": layout == best,
                "micro_batches": options.micro_batches,
                "workers": options.workers,
                "their_choice": chosen if peer == "authors_best" else None,
                "threads": threads,
                "ours_ms": statistics.median(times[layout]),
                "theirs_ms": statistics.median(times[peer]),
                "ours_over_theirs": statistics.median(a / b for a, b in zip(times[layout], times[peer])),
                "speedup": statistics.median(b / a for a, b in zip(times[layout], times[peer])),
                "theirs_over_plain": statistics.median(a / b for a, b in zip(times[peer], times["plain"])),
                "rounds": rounds,
            })
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="the built penalty_overhead")
    parser.add_argument("--model", action="append", choices=list(NETWORKS), help="networks; all by default")
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--micro-batches", type=int, default=1, help="in a step")
    parser.add_argument("--workers", type=int, default=0, help="micro-batches at a time, ours; 0: one, on all threads")
    parser.add_argument("--best", action="store_true", help="the authors' formula in its best layout and threads too")
    parser.add_argument("--compile", action="store_true", help="torch.compile'd peers too; takes minutes")
    parser.add_argument("--threads", type=int, default=0, help="0: LibTorch's choice")
    parser.add_argument("--rounds", type=int, default=0, help="exactly so many rounds instead of a time")
    parser.add_argument("--seconds", type=float, default=60, help="time for a network; at least three rounds")
    parser.add_argument("--malloc", choices=["tuned", "default"], default="tuned")
    parser.add_argument("--json", help="write the rows as an array of objects")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.malloc == "tuned":
        keep_freed_memory()

    print(f"LibTorch {torch.__version__}, {torch.get_num_threads()} threads, {options.micro_batches} micro-batches of "
          f"{options.micro_batch}, {options.workers} workers. Ours: gradient_norm, exact, fused, in each layout; theirs: "
          "in NCHW.\nspeed-up: their time over ours, median over interleaved rounds; * our best layout.\n")
    print(f"{'model':<14}{'peer':<19}{'our layout':<16}{'ours ms':>9}{'theirs ms':>11}{'ours/theirs':>13}{'speed-up':>10}"
          f"{'theirs/plain':>14}")
    rows = []
    for network in options.model or NETWORKS:
        for row in compare(options.program, network, options):
            rows.append(row)
            mark = " *" if row["best_layout"] else ""
            print(f"{row['model']:<14}{row['peer']:<19}{row['layout'] + mark:<16}{row['ours_ms']:>9.1f}"
                  f"{row['theirs_ms']:>11.1f}{row['ours_over_theirs']:>13.2f}{row['speedup']:>10.2f}"
                  f"{row['theirs_over_plain']:>14.2f}", flush=True)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
