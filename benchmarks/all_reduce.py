#!/usr/bin/env python3
"""How long ranks take to add up so many bytes over Gloo on this machine: the most that hiding the sums behind a backward
pass could gain of a step (docs/distributed.md).

    python3 benchmarks/all_reduce.py [MEGABYTES [RANKS]]
"""
import os
import statistics
import sys
import time

import torch
import torch.distributed
import torch.multiprocessing


def work(rank, ranks, megabytes, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    bucket = torch.ones(int(megabytes * 1e6 / 4))
    times = []
    for _ in range(50):
        torch.distributed.barrier()
        start = time.perf_counter()
        torch.distributed.all_reduce(bucket)
        times.append(time.perf_counter() - start)
        bucket.fill_(1)
    if rank == 0:
        print(f"{megabytes} MB, {ranks} ranks: {1000 * statistics.median(times):.2f} ms, median of {len(times)}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    size = float(sys.argv[1]) if len(sys.argv) > 1 else 3.1
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    torch.multiprocessing.spawn(work, (count, size, 20000 + os.getpid() % 10000), count)
