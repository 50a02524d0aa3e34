"""Trajectories as Parquet, one row each. Saved rollouts, logged data and checkpoints share this format."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..files import write_table
from ..trajectory import End, Source, Trajectory

REWARD_PREFIX = "rewards/"  # followed by the name of a reward function

SCHEMA = {
    "prompt_ids": pa.list_(pa.int32()),
    "completion_ids": pa.list_(pa.int32()),
    "loss_mask": pa.list_(pa.bool_()),
    "reward": pa.float64(),
    "end": pa.string(),
    "source": pa.string(),
    "group": pa.int64(),
    "policy_step": pa.int64(),
    "first_policy_step": pa.int64(),
    "policy_version": pa.string(),
    "first_policy_version": pa.string(),
    "ref_log_probs": pa.list_(pa.float32()),
    "ref_soft_value": pa.float64(),
    "ref_end_value": pa.float64(),
    "ref_key": pa.string(),
    "value": pa.float64(),
    "baseline": pa.float64(),
    "priority": pa.float64(),
}


def to_row(trajectory: Trajectory) -> dict[str, Any]:
    """The columns of a trajectory, as plain values by name. Vision inputs are left out."""
    log_probs = trajectory.ref_log_probs
    return {
        "prompt_ids": trajectory.prompt_ids.numpy(),
        "completion_ids": trajectory.completion_ids.numpy(),
        "loss_mask": trajectory.loss_mask.numpy(),
        "reward": None if np.isnan(trajectory.reward) else trajectory.reward,
        "end": trajectory.end.value,
        "source": trajectory.source.value,
        "group": trajectory.group_id,
        "policy_step": trajectory.policy_step,
        "first_policy_step": trajectory.first_policy_step,
        "policy_version": trajectory.policy_version,
        "first_policy_version": trajectory.first_policy_version,
        "ref_log_probs": None if log_probs is None else log_probs.numpy(),
        "ref_soft_value": trajectory.ref_soft_value,
        "ref_end_value": trajectory.ref_end_value,
        "ref_key": trajectory.ref_key,
        "value": trajectory.value,
        "baseline": trajectory.baseline,
        "priority": trajectory.priority,
        **{REWARD_PREFIX + name: reward for name, reward in trajectory.rewards.items()},
    }


def from_row(row: Mapping[str, Any]) -> Trajectory:
    """The inverse of `to_row`. Other columns are ignored."""
    log_probs = row.get("ref_log_probs")
    return Trajectory(
        prompt_ids=torch.as_tensor(np.asarray(row["prompt_ids"]), dtype=torch.long),
        completion_ids=torch.as_tensor(np.asarray(row["completion_ids"]), dtype=torch.long),
        loss_mask=torch.as_tensor(np.asarray(row["loss_mask"]), dtype=torch.bool),
        reward=np.nan if row["reward"] is None else row["reward"],
        end=End(row["end"]),
        source=Source(row["source"]),
        rewards={
            name.removeprefix(REWARD_PREFIX): value
            for name, value in row.items()
            if name.startswith(REWARD_PREFIX) and value is not None
        },
        group_id=row["group"],
        policy_step=row.get("policy_step"),
        first_policy_step=row.get("first_policy_step"),
        policy_version=row.get("policy_version"),
        first_policy_version=row.get("first_policy_version"),
        ref_log_probs=None if log_probs is None else torch.as_tensor(np.asarray(log_probs, dtype=np.float32)),
        ref_soft_value=row.get("ref_soft_value"),
        ref_end_value=row.get("ref_end_value"),
        ref_key=row.get("ref_key"),
        value=row.get("value"),
        baseline=row.get("baseline") or 0.0,
        priority=row.get("priority"),
    )


def write_trajectories(
    path: Path,
    trajectories: Sequence[Trajectory],
    extra: Mapping[str, pa.Array] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write trajectories without their vision inputs, and `extra` columns of the same length, to one Parquet file.

    The file appears under its name only when it is complete.
    """
    rows = [to_row(trajectory) for trajectory in trajectories]
    by_function = sorted({name for row in rows for name in row if name.startswith(REWARD_PREFIX)})
    columns = {name: pa.array([row[name] for row in rows], type) for name, type in SCHEMA.items()}
    columns |= {name: pa.array([row.get(name) for row in rows], pa.float64()) for name in by_function}
    write_table(path, pa.table({**columns, **(extra or {})}).replace_schema_metadata(metadata))


def read_trajectories(path: Path) -> list[Trajectory]:
    """Read the trajectories of one file."""
    return [from_row(row) for batch in pq.ParquetFile(path).iter_batches() for row in batch.to_pylist()]
