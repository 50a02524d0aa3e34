"""How a step's cost grows with model width, completion length, rollouts and processes: TBRM and TRL's GRPO.

    python benchmarks/growth.py              # models of random weights; within half an hour on two quiet cores
    python benchmarks/growth.py --quick      # small sizes, to a temporary folder

Writes docs/benchmarks/growth.{json,md,png}. With a CUDA device it uses that, writes growth_cuda.{json,md,png}, and
leaves out the processes.
"""

import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import tiny
from common.launch import launch
from common.measure import set_up
from common.report import parse, plt, table, wrapped, write
from step import (
    CUDA,
    PARTS,
    PEER,
    SUFFIX,
    Measurement,
    Repetitions,
    Work,
    above_floor,
    environment,
    introduction,
    measure,
    middle,
    paired,
    run,
)

METHODS = ("TBRM", PEER)
LAYERS, VOCABULARY, HEAD = 4, 8192, 32
# Processes and the threads of each.
LAUNCHES = ((1, 1), (1, 2), (2, 1))


@dataclass(frozen=True)
class Sizes:
    """The points of each axis, and its base, which holds while another axis varies."""

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
    """Work with equal completions and prompts half as long. Sizes that are not given have their base value."""
    length, rollouts = length or sizes.base_length, rollouts or sizes.base_rollouts
    lengths = (length,) * rollouts
    warm_up = lengths if CUDA else (4,) * rollouts
    return Work(model_of(width or sizes.base_width, folder), length // 2, lengths, sizes.micro_batch, warm_up)


Axis = dict[int, dict[str, Repetitions]]  # by point and method


def along(axis: str, sizes: Sizes, repetitions: int, folder: Path) -> Axis:
    works = {point: work_of(sizes, folder, **{axis: point}) for point in getattr(sizes, axis)}
    return run(works, repetitions, METHODS, memory=True)


def over_processes(sizes: Sizes, repetitions: int, folder: Path) -> dict[str, Repetitions]:
    """Measure the same rollouts per step on one process and on two, each in a launch of its own."""
    measured: dict[str, Repetitions] = {}
    model_of(sizes.base_width, folder)
    for repetition in range(repetitions):
        for processes, threads in LAUNCHES:
            launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            rollouts = sizes.base_rollouts // processes
            given: dict[str, Any] = dict(sizes=asdict(sizes), folder=str(folder), rollouts=rollouts, seed=repetition)
            one = Measurement(
                launch("growth:worker", launcher, environment={"OMP_NUM_THREADS": str(threads)}, **given)[0]
            )
            measured.setdefault(f"{processes} x {threads}", []).append(one)
            print(f"{repetition} {processes} processes of {threads} threads: {one.seconds():.2f} s", file=sys.stderr)
    return measured


def worker(sizes: dict[str, Any], folder: str, rollouts: int, seed: int) -> list[dict[str, float]]:
    """One process's part of a step, in a process group."""
    return measure("TBRM", work_of(Sizes(**sizes), Path(folder), rollouts=rollouts), seed).updates


# ---- report ---------------------------------------------------------------------------------------------------------


KINDS = ("total", "without generation")


def exponent(points: Sequence[int], values: Sequence[float]) -> float:
    """Slope of log value over log point, between the last two points."""
    return math.log(values[-1] / values[-2]) / math.log(points[-1] / points[-2])


def axis_table(axis: Axis) -> str:
    columns: dict[str, list[float]] = {}  # along the axis
    for kind, title in zip(KINDS, ("s", "s without generation"), strict=True):
        columns |= {f"{m}, {title}": [middle(of[m], kind) for of in axis.values()] for m in METHODS}
    columns |= {f"{m}, MiB": [above_floor(of[m]) for of in axis.values()] for m in METHODS}
    rows = []
    for place, (point, of) in enumerate(axis.items()):
        cells = [f"{column[place]:.{1 if 'MiB' in name else 2}f}" for name, column in columns.items()]
        shares = [f"{statistics.median(paired(of['TBRM'], of[PEER], kind)):.2f}" for kind in KINDS]
        rows.append([f"{point:,}", *cells, *shares])
    powers = [f"{exponent(list(axis), column):.2f}" for column in columns.values()]
    rows.append(["grows by the power", *powers, "", ""])
    return table(["", *columns, "ratio", "ratio without"], rows)


def processes_table(measured: dict[str, Repetitions]) -> str:
    base, rows = next(iter(measured.values())), []
    for name, of in measured.items():
        parts = [f"{middle(of, part):.2f}" for part in ("total", *PARTS)]
        rows.append([name, *parts, f"{statistics.median(paired(of, base)):.2f}"])
    return table(["processes x threads", "step, s", *PARTS, "of the first"], rows)


def report(
    axes: dict[str, Axis], processes: dict[str, Repetitions], sizes: Sizes, where: dict[str, Any], repetitions: int
) -> str:
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
    picture = [f"![growth](growth{SUFFIX}.png)"] if axes else []
    intro = introduction("growth", where)
    return "\n\n".join(["# How a step's cost grows", intro, *picture, wrapped(setting), *blocks]) + "\n"


def draw(axes: dict[str, Axis]) -> plt.Figure:
    figure, panels = plt.subplots(2, len(axes), figsize=(4 * len(axes), 6.5), squeeze=False)
    for (name, axis), (above, below) in zip(axes.items(), panels.T, strict=True):
        points = list(axis)
        for method, colour in zip(METHODS, ("tab:red", "black"), strict=True):
            of = [one[method] for one in axis.values()]
            for kind, style, label in zip(KINDS, ("-o", ":o"), (method, None), strict=True):
                above.plot(points, [middle(one, kind) for one in of], style, color=colour, markersize=4, label=label)
            below.plot(points, [above_floor(one) for one in of], "-o", color=colour, markersize=4)
        for panel in (above, below):
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(points, [f"{point:,}" for point in points])
            panel.grid(alpha=0.3, which="both")
        below.set(xlabel=AXES[name])
    panels[0][0].set(ylabel="seconds a step (dotted: without generation)")
    panels[1][0].set(ylabel="MiB above the floor")
    panels[0][0].legend()
    return figure


def main() -> None:
    arguments = parse(
        __doc__,
        quick="small sizes",
        axes=dict(nargs="+", choices=[*AXES, "processes"], default=[*AXES, "processes"]),
        repetitions=dict(type=int, help="default: 5, with --quick 1"),
        threads=dict(type=int, default=2),
    )
    sizes = QUICK if arguments.quick else Sizes()
    set_up(arguments.threads)
    repetitions = arguments.repetitions or (1 if arguments.quick else 5)
    with tempfile.TemporaryDirectory() as folder:
        axes = {axis: along(axis, sizes, repetitions, Path(folder)) for axis in AXES if axis in arguments.axes}
        wanted = "processes" in arguments.axes and not CUDA
        processes = over_processes(sizes, repetitions, Path(folder)) if wanted else {}
    where = environment(arguments.threads)
    raw = {
        "environment": where,
        "sizes": asdict(sizes),
        "axes": axes,
        "processes": processes,
    }
    text, figure = report(axes, processes, sizes, where, repetitions), draw(axes) if axes else None
    write(arguments.output, f"growth{SUFFIX}", text, raw, figure)


if __name__ == "__main__":
    main()
