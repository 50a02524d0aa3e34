"""Reference scores of a log, computed once, kept on disk and shared by all runs on it."""

import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset, concatenate_datasets
from tqdm.auto import tqdm

from ..files import column_parts, map_table, read_table, write_tables
from ..processes import failing_together
from ..trajectory import Trajectory, check_scores
from .logged import logged_trajectory
from .parquet import write_trajectories

_SCORES = ("ref_log_probs", "ref_soft_value", "ref_end_value", "ref_key")  # columns of a scored log


def precompute_scores(
    dataset: Dataset,
    folder: Path,
    reference_key: str,
    accelerator: Accelerator,
    score: Callable[[Sequence[Trajectory], Trajectory], None],
    block: int = 1024,
    show_progress: bool = False,
) -> Dataset:
    """Add reference scores to every row of a data set of logged trajectories.

    The scores are kept in `folder` under a digest of the reference and the trajectories. Another run on the same
    reference and trajectories reads them back. An interrupted run continues with the next block. All processes must see
    the same folder.

    Args:
        dataset: rows as `logged.logged_trajectory` reads them.
        folder: where scores are kept.
        reference_key: digest of the reference, which the scores carry.
        accelerator: the trainer's.
        score: writes the scores onto trajectories. Its second argument is run by a process with none left.
        block: trajectories in memory at once, on each process.
        show_progress: whether the main process shows a progress bar.

    Raises:
        ValueError: for a score that is not finite. The message names the row.
    """
    digest = xxhash.xxh3_128(reference_key.encode())
    ids = dataset.select_columns(["prompt_ids", "completion_ids", "loss_mask"])
    for row in ids.with_format("numpy"):
        for values in row.values():
            digest.update(len(values).to_bytes(8, "little") + values.tobytes())
    file = folder / f"{digest.hexdigest()}.parquet"
    process, processes = accelerator.process_index, accelerator.num_processes
    if not all(gather_object([file.exists()])):
        size = block * processes
        parts = {
            first: [file.with_suffix("") / f"{first:09d}-{size}-process-{one}.parquet" for one in range(processes)]
            for first in range(0, len(dataset), size)
        }
        silent = not (show_progress and accelerator.is_main_process)
        with tqdm(total=len(dataset), desc="Scoring logged trajectories by the reference", disable=silent) as bar:
            for first, of_process in parts.items():
                if not all(gather_object([of_process[process].exists()])):
                    rows = range(first + process, min(first + size, len(dataset)), processes)
                    trajectories = [logged_trajectory(dataset[row]) for row in rows]
                    score(trajectories, trajectories[0] if trajectories else logged_trajectory(dataset[0]))
                    with failing_together():
                        check_scores(trajectories, [f"row {row} of the training set" for row in rows])
                        write_trajectories(of_process[process], trajectories)
                bar.update(min(size, len(dataset) - first))
        with failing_together():
            if accelerator.is_main_process:
                tables = map(_in_turn, parts.values())
                first_table = next(tables)
                write_tables(file, first_table.schema, itertools.chain([first_table], tables))
    with failing_together():
        if accelerator.is_main_process:
            map_table(file, list(_SCORES))
            shutil.rmtree(file.with_suffix(""), ignore_errors=True)
    scores = Dataset.from_file(str(file.with_suffix(".arrow")))
    _check_stored(scores, file)
    kept = dataset.remove_columns([name for name in _SCORES if name in dataset.column_names])
    return concatenate_datasets([kept, scores], axis=1)


def _check_stored(scores: Dataset, file: Path) -> None:
    """Refuse stored scores that are not finite, from an earlier version or a damaged disk. It reads whole columns."""
    for name in ("ref_log_probs", "ref_soft_value"):
        for _, column in column_parts(scores, name):
            values = column.flatten() if pa.types.is_list(column.type) else column
            if pc.any(pc.invert(pc.is_finite(values))).as_py():  # None if there are no values
                raise ValueError(f"{file} holds reference scores (`{name}`) that are not finite. Delete it.")


def _in_turn(files: Sequence[Path]) -> pa.Table:
    """The scores of a block in row order. Process p of P has written the block's rows p, p + P, p + 2P, …"""
    tables = [read_table(file, list(_SCORES)) for file in files]
    before = np.cumsum([0, *map(len, tables)])
    rows = np.arange(before[-1])
    return pa.concat_tables(tables).take(before[rows % len(tables)] + rows // len(tables))
