"""What the replay buffer costs as it grows: memory, insertion, sampling.

    python benchmarks/replay_buffer.py        # writes docs/benchmarks/replay_buffer.{json,md,png}; a few minutes

Trajectories of random tokens with a prompt of 64 and a log-normal number of completion tokens (median 128, at most
1,024), one in four with tokens that a tool inserted, in buffers that hold 1,000 to 1,000,000 of them. Each buffer is
filled beyond its size, so that it evicts, and then drawn from.
"""

import os
import platform
import statistics
import time
from typing import Any

import numpy as np
import torch
from common.report import listed, parse, plt, table, versions, write

from tbrm_trl.sources.replay import ReplayBuffer
from tbrm_trl.trajectory import End, Trajectory

SIZES = (1_000, 10_000, 100_000, 1_000_000)
PROMPT, MEDIAN, LONGEST = 64, 128, 1024  # tokens
DRAWN, REPEATS = 64, 25  # trajectories per draw; timed draws


def trajectories(count: int, rng: np.random.Generator) -> list[Trajectory]:
    made = []
    for index in range(count):
        length = int(min(LONGEST, max(1, rng.lognormal(np.log(MEDIAN), 0.8))))
        mask = torch.ones(length, dtype=torch.bool)
        if index % 4 == 0:
            mask[length // 3 : length // 2] = False
        ids = torch.from_numpy(rng.integers(0, 150_000, PROMPT + length))
        one = Trajectory(ids[:PROMPT], ids[PROMPT:], mask, float(rng.random()), End.EOS, policy_step=0)
        one.ref_log_probs, one.ref_soft_value, one.ref_key = -torch.rand(length) * mask, 20.0, "reference"
        made.append(one)
    return made


def measure(size: int, prioritized: bool, pool: list[Trajectory]) -> dict[str, float]:
    buffer = ReplayBuffer(size, prioritized=prioritized)
    begin = time.perf_counter()
    for index in range(size + size // 10):
        buffer.add([pool[index % len(pool)]])
    insertion = (time.perf_counter() - begin) / (size + size // 10)
    for number in range(buffer.stored.first, buffer.stored.end, 2):
        buffer.set_priority(number, 0.1)
    seconds = []
    for _ in range(REPEATS + 1):
        begin = time.perf_counter()
        sample = buffer.sample(DRAWN, 1, lambda mine: torch.tensor([mine]))
        seconds.append(time.perf_counter() - begin)
        assert sample is not None and len(sample.trajectories) == DRAWN
        for number in sample.numbers:
            buffer.set_priority(number, 0.2)
    kept = [pool[index % len(pool)] for index in range(size // 10, size + size // 10)]
    ids = 4 * sum(map(len, kept))
    return {
        "insertion_us": 1e6 * insertion,
        "sampling_ms": 1e3 * statistics.median(seconds[1:]),
        "bytes": buffer.stored.nbytes,
        "bytes_of_ids": ids,
        "bound": 1.1 * ids + 64 * size,
    }


def report(results: dict[str, Any]) -> str:
    rows = [
        [
            f"{int(size):,}",
            f"{uniform['insertion_us']:.0f} µs",
            f"{uniform['sampling_ms']:.2f} ms",
            f"{prioritized['sampling_ms']:.2f} ms",
            f"{uniform['bytes'] / 2**20:,.1f} MiB",
            f"{(uniform['bytes'] - uniform['bytes_of_ids']) / int(size):.0f} B",
            f"{uniform['bytes'] / uniform['bound']:.3f}",
        ]
        for size, (uniform, prioritized) in results["sizes"].items()
    ]
    header = "trajectories|insertion of one|uniform draw|prioritized draw|memory|beside the ids, each|of the bound"
    return f"""# What the replay buffer costs as it grows

Written by `python benchmarks/replay_buffer.py`. {results["hardware"]}; {listed(results["versions"])}.
Raw numbers: [replay_buffer.json](replay_buffer.json).

Trajectories of {PROMPT} prompt tokens and a log-normal number of completion tokens (median {MEDIAN}, at most
{LONGEST}), a quarter of them with inserted tokens and so with a loss mask to keep. Each buffer was filled, and a tenth
of it replaced. Sampling is the draw of {DRAWN} trajectories, made into tensors; medians of {REPEATS} draws.

{table(header.split("|"), rows)}

The bound is 1.1 × the bytes of the ids as int32 plus 64 bytes each. A uniform draw takes the same time from any buffer;
a prioritized one reads the priorities of the blocks that it draws from, or in which some have changed.

![cost against size](replay_buffer.png)
"""


def draw(results: dict[str, Any]) -> plt.Figure:
    sizes = [int(size) for size in results["sizes"]]
    uniform, prioritized = zip(*results["sizes"].values(), strict=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
    for axes, measured, name, scale, style, label in (
        (left, uniform, "sampling_ms", 1, "o-", f"uniform draw of {DRAWN}"),
        (left, prioritized, "sampling_ms", 1, "o-", f"prioritized draw of {DRAWN}"),
        (left, uniform, "insertion_us", 1e3, "o-", "insertion of one"),
        (right, uniform, "bytes", 2**20, "o-", "of its arrays"),
        (right, uniform, "bound", 2**20, "k--", "bound"),
        (right, uniform, "bytes_of_ids", 2**20, "k:", "ids alone, as int32"),
    ):
        axes.loglog(sizes, [one[name] / scale for one in measured], style, label=label)
    for axes, unit in ((left, "milliseconds"), (right, "MiB")):
        axes.set(xlabel="trajectories in the buffer", ylabel=unit)
        axes.legend(frameon=False)
    return figure


def main() -> None:
    arguments = parse(__doc__, largest=dict(type=int, default=SIZES[-1], help="leave out larger buffers"))
    torch.manual_seed(0)
    pool = trajectories(10_000, np.random.default_rng(0))
    results = {
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions("torch", "numpy"),
        "sizes": {
            size: [measure(size, prioritized, pool) for prioritized in (False, True)]
            for size in SIZES
            if size <= arguments.largest
        },
    }
    write(arguments.output, "replay_buffer", report(results), results, draw(results))


if __name__ == "__main__":
    main()
