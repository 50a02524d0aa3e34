"""Chooses the rows of each generation window: prompts to roll out and logged trajectories, in two streams."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import IterableDataset, Sampler

from ..options import TBRMOptions


@dataclass(frozen=True)
class WindowMix:
    """How many rollouts and logged trajectories one generation window has, over all processes."""

    rollouts: int
    logged: int


def window_mix(fresh_rows: int, logged_rows: int, args: TBRMOptions, group_size: int) -> WindowMix:
    """Divide a generation batch between the two kinds of rows in a data set.

    The rollouts must be whole groups of `num_generations` and the same number on every process. A given
    `logged_fraction` must be met exactly. By default the share is the possible one closest to the data set's.

    Args:
        fresh_rows: prompts in the data set.
        logged_rows: rows with a completion.
        args: the options.
        group_size: trajectories of one prompt that must be on one process; 1 if none are compared.

    Raises:
        ValueError: for a fraction that cannot be met, or that is given although only one kind of row exists. Also for a
            batch that cannot be divided.
    """
    size, wanted = args.generation_batch_size, args.logged_fraction
    if not (fresh_rows and logged_rows):
        if wanted is not None:
            kind = "logged trajectories" if logged_rows else "prompts without a completion"
            raise ValueError(
                f"`logged_fraction={wanted}` mixes logged trajectories with rollouts, but the training set has only "
                f"{kind}. Leave it at None."
            )
        return WindowMix(size, 0) if fresh_rows else WindowMix(0, size)
    unit = math.lcm(args.num_generations, args.world_size)
    if group_size > 1:
        unit = args.num_generations * args.world_size  # whole groups on every process
    possible = [size - rollouts for rollouts in range(unit, size, unit)]
    if not possible:
        raise ValueError(
            f"A generation batch of {size} trajectories cannot be divided between rollouts and logged trajectories: "
            f"rollouts come in multiples of {unit} (num_generations {args.num_generations}, {args.world_size} "
            "processes). Raise per_device_train_batch_size or steps_per_generation."
        )
    share = logged_rows / (logged_rows + fresh_rows * args.num_generations) if wanted is None else wanted
    logged = min(possible, key=lambda count: abs(count - share * size))
    if wanted is not None and abs(logged - share * size) > 1e-6 * size:
        near = sorted(sorted(possible, key=lambda count: abs(count - share * size))[:2])
        raise ValueError(
            f"`logged_fraction={wanted}` of a generation batch of {size} trajectories leaves no whole number of "
            f"rollouts (multiples of {unit}). Nearest: {' or '.join(f'{count / size:g}' for count in near)}."
        )
    return WindowMix(size - logged, logged)


@dataclass(frozen=True)
class DataPlan:
    """How generation windows are made from a training set.

    Attributes:
        logged: `(N,)` bool, which rows are logged.
        mix: how many trajectories of a window are rolled out, and how many are logged.
        prompt_numbers: `(N,)` equal for logged rows of one prompt; None if no logged rows are compared.
    """

    logged: np.ndarray
    mix: WindowMix
    prompt_numbers: np.ndarray | None


class Orders:
    """The orders of rows in their passes, numbered from 0: those of TRL's sampler, whose generator goes on.

    To come to a pass, the shuffles between it and one of the last few asked for are made, not those of all before it.

    Args:
        rows: `(N,)` row indices.
        seed: of the first pass; None keeps the rows as they are in every pass.
    """

    KEPT = 8  # passes from which to go on

    def __init__(self, rows: np.ndarray, seed: int | None):
        self.rows, self.seed = rows, seed
        self._before: dict[int, torch.Tensor] = {}  # by pass, the generator's state before its shuffle

    def __call__(self, number: int) -> np.ndarray:
        """The rows in the order of the pass with this number, `(N,)`."""
        if self.seed is None:
            return self.rows
        before = self._before
        generator, start = torch.Generator().manual_seed(self.seed), max((i for i in before if i <= number), default=0)
        if start:
            generator.set_state(before[start])
        for made in range(start, number + 1):
            if made > number - self.KEPT:
                before = {**before, made: generator.get_state()}
            order = torch.randperm(len(self.rows), generator=generator)
        self._before = dict(sorted(before.items())[-self.KEPT :])  # a new one: threads may be reading the old one
        return self.rows[order.numpy()]


class WindowSampler(Sampler[int]):
    """Yields row indices window by window; each process's share holds its rollouts first, then its logged rows.

    An epoch is one pass over the prompts, or over the logged rows if there are no prompts. A pass draws every prompt
    `num_generations` times and every logged row once. If logged rows are compared, `group_size` rows of one prompt
    are adjacent. Rows that fill no group are left out of this pass; the next pass leaves out others. The logged stream
    restarts in another order as often as needed, across windows and epochs. A window is repeated for each micro-step
    that trains on it, as TRL's loader expects.

    The order depends only on seed and epoch, so a run resumed in any epoch sees the rows it would have seen.

    Args:
        logged: `(N,)` bool, which rows are logged.
        mix: how many rollouts and logged trajectories a window has.
        generations: rollouts per prompt.
        processes: number of processes that share a window.
        repeats: micro-steps per window.
        epoch: returns the number of the epoch that begins.
        seed: of the shuffling; None keeps the order of the data set.
        group_size: number of adjacent logged rows of one prompt, which can then be compared.
        prompt_numbers: `(N,)` equal for rows of one prompt; needed if `group_size` is not 1.
    """

    def __init__(
        self,
        logged: np.ndarray,
        mix: WindowMix,
        generations: int,
        processes: int,
        repeats: int,
        epoch: Callable[[], int],
        seed: int | None,
        group_size: int = 1,
        prompt_numbers: np.ndarray | None = None,
    ):
        self.prompts, self.logged = np.flatnonzero(~logged), np.flatnonzero(logged)
        self.group_size, self.prompt_numbers = group_size, prompt_numbers
        self.logged_per_pass = len(self._grouped(self.logged))
        self.mix, self.generations, self.processes, self.repeats = mix, generations, processes, repeats
        self.epoch, self.seed = epoch, seed
        self._prompts: dict[int, np.ndarray] = {}  # by epoch
        self._passes: dict[int, np.ndarray] = {}  # over the logged rows, by number
        self._orders_of_prompts, self._orders_of_logged = (Orders(rows, seed) for rows in (self.prompts, self.logged))
        self.windows = (
            len(self.prompts) * generations // mix.rollouts if mix.rollouts else self.logged_per_pass // mix.logged
        )

    def __len__(self) -> int:
        return self.windows * (self.mix.rollouts + self.mix.logged) * self.repeats

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch()
        for number in range(self.windows):
            indices = self.window(epoch * self.windows + number)
            for _ in range(self.repeats):
                yield from indices

    def window(self, number: int) -> list[int]:
        """All processes' row indices of a window. Windows are counted from the first one of the first epoch."""
        epoch, place = divmod(number, self.windows)
        prompts = self._prompts_of(epoch)[place * self.mix.rollouts : (place + 1) * self.mix.rollouts]
        logged = self._logged_stream(number * self.mix.logged, self.mix.logged)
        shares = zip(np.split(prompts, self.processes), np.split(logged, self.processes), strict=True)
        return np.concatenate([part for share in shares for part in share]).tolist()

    def rollouts(self, number: int, process: int) -> list[int]:
        """The row indices of a window that a process rolls out."""
        size, own = (self.mix.rollouts + self.mix.logged) // self.processes, self.mix.rollouts // self.processes
        return self.window(number)[process * size : process * size + own]

    def _prompts_of(self, epoch: int) -> np.ndarray:
        """The prompts of an epoch in order, each as often as it is drawn. The last two epochs asked for are cached."""
        prompts = self._prompts.get(epoch)
        if prompts is None:
            order = self._orders_of_prompts(epoch) if self.mix.rollouts else self.prompts
            prompts = order.repeat(self.generations)
            self._prompts = {**dict(list(self._prompts.items())[-1:]), epoch: prompts}  # threads may be reading it
        return prompts

    def _logged_stream(self, start: int, count: int) -> np.ndarray:
        if not count:
            return self.logged[:0]
        first, last = start // self.logged_per_pass, (start + count - 1) // self.logged_per_pass
        passes = [self._pass_of_logged(number) for number in range(first, last + 1)]
        offset = start - first * self.logged_per_pass
        return (passes[0] if first == last else np.concatenate(passes))[offset : offset + count]

    def _pass_of_logged(self, number: int) -> np.ndarray:
        """The logged rows that a pass draws, in order. The last two passes asked for are cached."""
        rows = self._passes.get(number)
        if rows is None:
            rows = self._grouped(self._order_of_logged(number))
            self._passes = {**dict(list(self._passes.items())[-1:]), number: rows}  # threads may be reading it
        return rows

    def _order_of_logged(self, number: int) -> np.ndarray:
        """The logged rows in the order of the pass with this number.

        Without shuffling, a prompt's rows take turns in its places, or the same ones would never fill a group.
        """
        rows = self._orders_of_logged(number)
        if self.seed is not None or self.group_size == 1 or self.prompt_numbers is None:
            return rows
        of, turned = self.prompt_numbers[rows], rows.copy()
        for places in np.split(np.argsort(of, kind="stable"), np.flatnonzero(np.diff(np.sort(of))) + 1):
            whole = len(places) // self.group_size * self.group_size
            turned[places] = np.roll(rows[places], -number * whole)
        return turned

    def _grouped(self, rows: np.ndarray) -> np.ndarray:
        """The rows in groups of one prompt, each placed where it becomes full. Rows that fill no group are dropped."""
        if self.group_size == 1 or self.prompt_numbers is None:
            return rows
        waiting: dict[int, list[int]] = {}
        groups: list[list[int]] = []
        for row, prompt in zip(rows.tolist(), self.prompt_numbers[rows].tolist(), strict=True):
            group = waiting.setdefault(prompt, [])
            group.append(row)
            if len(group) == self.group_size:
                groups.append(waiting.pop(prompt))
        return np.array(groups, dtype=rows.dtype).reshape(-1)


class WholeStream(IterableDataset[Any]):
    """A stream that every process reads whole, to take its part of every window from it.

    If accelerate sees a `datasets.IterableDataset` of several files, it gives each process files of its own. But TRL
    has already divided the stream into windows of all processes together. Of every window a process would then draw
    only the first part, once for each process, and processes with fewer rows would end their pass earlier.

    Args:
        stream: gives the rows in the same order on every process.
    """

    def __init__(self, stream: datasets.IterableDataset):
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:
        return iter(self.stream)

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)
