"""How a step's cost grows with model width, completion length, rollouts and processes: TBRM beside TRL's GRPO.

    python benchmarks/growth.py              # models of random weights; within half an hour on two quiet cores
    python benchmarks/growth.py --quick      # small sizes, to a temporary folder

Writes docs/benchmarks/growth.{json,md,png}. On a CUDA device, where there is one: growth_cuda.{json,md,png}, without
the processes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers
from step import (
    CUDA,
    PARTS,
    PEER,
    ROOT,
    Measurement,
    Work,
    environment,
    hardware_line,
    measure,
    middle,
    table,
    tiny,
    wrapped,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = ("TBRM", PEER)
LAYERS, VOCABULARY, HEAD = 4, 8192, 32
# Processes and the threads of each.
LAUNCHES = ((1, 1), (1, 2), (2, 1))


@dataclass(frozen=True)
class Sizes:
    """The points of each axis; where another axis varies, the base."""

    width: tuple[int, ...] = (128, 256, 512, 1024)
    length: tuple[int, ...] = (64, 128, 256, 512, 1024)
    rollouts: tuple[int, ...] = (4, 8, 16, 32)
    base_width: int = 256
    base_length: int = 64
    base_rollouts: int = 8
    micro_batch: int = 2


QUICK = Sizes(width=(32, 64), length=(8, 16), rollouts=(4, 8), base_width=32, base_length=8, base_rollouts=4)
AXES = {"width": "model width", "length": "tokens of a completion", "rollouts": "rollouts per step"}


def model_of(width: int, folder: Path) -> str:
    """A Llama of random weights; returns its folder."""
    return tiny.save(
        folder / f"width-{width}", "llama", hidden_size=width, intermediate_size=3 * width, num_hidden_layers=LAYERS,
        num_attention_heads=width // HEAD, num_key_value_heads=width // HEAD, head_dim=HEAD, vocab_size=VOCABULARY,
        max_position_embeddings=2048, initializer_range=0.02,
    )  # fmt: skip


def work_of(sizes: Sizes, folder: Path, width: int = 0, length: int = 0, rollouts: int = 0) -> Work:
    """Equal completions, prompts half as long; what is not given is at its base."""
    length, rollouts = length or sizes.base_length, rollouts or sizes.base_rollouts
    lengths = (length,) * rollouts
    warm_up = lengths if CUDA else (4,) * rollouts
    return Work(model_of(width or sizes.base_width, folder), length // 2, lengths, sizes.micro_batch, warm_up)


Axis = dict[int, dict[str, list[Measurement]]]  # by point and method, one of each repetition


def along(axis: str, sizes: Sizes, repetitions: int, folder: Path) -> Axis:
    measured: Axis = {point: {method: [] for method in METHODS} for point in getattr(sizes, axis)}
    for repetition in range(repetitions):
        for point, of in measured.items():
            work = work_of(sizes, folder, **{axis: point})
            for method in METHODS if repetition % 2 == 0 else reversed(METHODS):
                one = measure(method, work, seed=repetition, memory=repetition == 0)
                of[method].append(one)
                print(
                    f"{repetition} {axis} {point} {method}: {one.seconds():.2f} s {one.memory or ''}", file=sys.stderr
                )
    return measured


def over_processes(sizes: Sizes, repetitions: int, folder: Path) -> dict[str, list[Measurement]]:
    """The same rollouts per step, on one process and on two, each in a run of its own."""
    measured: dict[str, list[Measurement]] = {}
    model_of(sizes.base_width, folder)
    for repetition in range(repetitions):
        for processes, threads in LAUNCHES:
            output = folder / "worker.json"
            command = [
                sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                __file__, "--worker", str(folder), str(output), str(sizes.base_rollouts // processes), str(repetition),
                *(["--quick"] if sizes is QUICK else []), "--threads", str(threads),
            ]  # fmt: skip
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
            one = Measurement(json.loads(output.read_text()))
            measured.setdefault(f"{processes} x {threads}", []).append(one)
            print(f"{repetition} {processes} processes of {threads} threads: {one.seconds():.2f} s", file=sys.stderr)
    return measured


def worker(folder: Path, output: Path, rollouts: int, seed: int, sizes: Sizes) -> None:
    """One process's part of a step, in a process group."""
    one = measure("TBRM", work_of(sizes, folder, rollouts=rollouts), seed)
    if os.environ["RANK"] == "0":
        output.write_text(json.dumps(one.updates))
    torch.distributed.destroy_process_group()


# ---- report ---------------------------------------------------------------------------------------------------------


def seconds(measured: Sequence[Measurement], generation: bool = False) -> float:
    return middle([one.seconds() if generation else one.without_generation for one in measured])


def above_floor(measured: Sequence[Measurement]) -> float:
    assert measured[0].memory is not None, "measured in the first repetition"
    return measured[0].memory["above_floor"]


def exponent(points: Sequence[int], values: Sequence[float]) -> float:
    """Slope of log value over log point, between the last two points."""
    return math.log(values[-1] / values[-2]) / math.log(points[-1] / points[-2])


def axis_table(axis: Axis) -> str:
    rows = [
        [
            "",
            *(f"{m}, {what}" for what in ("s", "s without generation", "MiB") for m in METHODS),
            "ratio",
            "ratio without",
        ]
    ]
    for point, of in axis.items():
        cells = [f"{seconds(of[method], generation):.2f}" for generation in (True, False) for method in METHODS]
        cells += [f"{above_floor(of[method]):.1f}" for method in METHODS]
        for generation in (True, False):
            pairs = zip(of["TBRM"], of[PEER], strict=True)
            cells.append(f"{middle([seconds([a], generation) / seconds([b], generation) for a, b in pairs]):.2f}")
        rows.append([f"{point:,}", *cells])
    last = ["grows by the power"]
    for generation in (True, False):
        last += [f"{exponent(list(axis), [seconds(of[m], generation) for of in axis.values()]):.2f}" for m in METHODS]
    last += [f"{exponent(list(axis), [above_floor(of[m]) for of in axis.values()]):.2f}" for m in METHODS]
    rows.append([*last, "", ""])
    return table(rows)


def processes_table(measured: dict[str, list[Measurement]]) -> str:
    base = next(iter(measured.values()))
    rows = [["processes x threads", "step, s", *PARTS, "of the first"]]
    for name, of in measured.items():
        ratio = middle([one.seconds() / first.seconds() for one, first in zip(of, base, strict=True)])
        parts = [f"{middle([one.seconds(part) for one in of]):.2f}" for part in ("total", *PARTS)]
        rows.append([name, *parts, f"{ratio:.2f}"])
    return table(rows)


def report(
    axes: dict[str, Axis],
    processes: dict[str, list[Measurement]],
    sizes: Sizes,
    where: dict[str, Any],
    name: str,
    repetitions: int,
) -> str:
    intro = f"""Written by `python benchmarks/growth.py`. {hardware_line(where)}
        Raw numbers: [{name}.json]({name}.json)."""
    setting = f"""A Llama of {LAYERS} layers and {VOCABULARY:,} tokens with random weights, width {sizes.base_width}
        where it is not varied; {sizes.base_rollouts} rollouts a step in micro-batches of {sizes.micro_batch},
        completions of {sizes.base_length} tokens, all equal, prompts half as long. Otherwise as in [step.md](step.md):
        medians of {repetitions} paired repetitions, memory above weights, gradients, optimizer states and reference.
        The power is that of the last doubling: 1 is proportional."""
    blocks = [f"## By {AXES[axis]}\n\n{axis_table(of)}" for axis, of in axes.items()]
    if processes:
        text = f"""The same rollouts per step of TBRM, split over the processes by DDP over gloo, on
            {where["cores"]} cores. Where two processes share two cores, the second adds none to the two threads that
            one process may use: set against "1 x 2", its row says what DDP costs; against "1 x 1", what a second core
            gives."""
        blocks.append(f"## By processes\n\n{wrapped(text)}\n\n{processes_table(processes)}")
    picture = [f"![growth]({name}.png)"] if axes else []
    return "\n\n".join(["# How a step's cost grows", wrapped(intro), *picture, wrapped(setting), *blocks]) + "\n"


def draw(axes: dict[str, Axis], path: Path) -> None:
    figure, panels = plt.subplots(2, len(axes), figsize=(4 * len(axes), 6.5), layout="constrained", squeeze=False)
    for (name, axis), (above, below) in zip(axes.items(), panels.T, strict=True):
        for method, colour in zip(METHODS, ("tab:red", "black"), strict=True):
            points, of = list(axis), [one[method] for one in axis.values()]
            above.plot(points, [seconds(one, True) for one in of], "-o", color=colour, markersize=4, label=method)
            above.plot(points, [seconds(one) for one in of], ":o", color=colour, markersize=3)
            below.plot(points, [above_floor(one) for one in of], "-o", color=colour, markersize=4)
        for panel in (above, below):
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(points, [f"{point:,}" for point in points])
            panel.grid(alpha=0.3, which="both")
        below.set(xlabel=AXES[name])
    panels[0][0].set(ylabel="seconds a step (dotted: without generation)")
    panels[1][0].set(ylabel="MiB above the floor")
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=130)


def plain(measured: dict[str, list[Measurement]]) -> dict[str, list[dict[str, Any]]]:
    """For JSON."""
    return {name: [asdict(one) for one in of] for name, of in measured.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--axes", nargs="+", choices=[*AXES, "processes"], default=[*AXES, "processes"])
    parser.add_argument("--repetitions", type=int, help="default: 5, with --quick 1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="default: docs/benchmarks, with --quick a temporary folder")
    parser.add_argument("--worker", nargs=4, metavar=("FOLDER", "OUTPUT", "ROLLOUTS", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else Sizes()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.worker:
        folder, target, rollouts, seed = arguments.worker
        worker(Path(folder), Path(target), int(rollouts), int(seed), sizes)
        return
    repetitions = arguments.repetitions or (1 if arguments.quick else 5)
    with tempfile.TemporaryDirectory() as temporary:
        axes = {axis: along(axis, sizes, repetitions, Path(temporary)) for axis in AXES if axis in arguments.axes}
        wanted = "processes" in arguments.axes and not CUDA
        processes = over_processes(sizes, repetitions, Path(temporary)) if wanted else {}
    quick_output = Path(tempfile.mkdtemp(prefix="growth-")) if arguments.quick else ROOT / "docs/benchmarks"
    output, name = arguments.output or quick_output, "growth_cuda" if CUDA else "growth"
    output.mkdir(parents=True, exist_ok=True)
    where = environment(arguments.threads)
    raw = {
        "environment": where,
        "sizes": asdict(sizes),
        "axes": {axis: {point: plain(of) for point, of in points.items()} for axis, points in axes.items()},
        "processes": plain(processes),
    }
    (output / f"{name}.json").write_text(json.dumps(raw, indent=1) + "\n")
    (output / f"{name}.md").write_text(report(axes, processes, sizes, where, name, repetitions))
    if axes:
        draw(axes, output / f"{name}.png")
    print((output / f"{name}.md").read_text())


if __name__ == "__main__":
    main()
