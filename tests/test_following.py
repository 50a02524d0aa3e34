"""Rollouts that others write: taken in order, each once, trained on as one's own; what is wrong has file and row."""

from __future__ import annotations

import math
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from helpers.runs import DATA, before_each_update, build, config, digits, kept_returns, letters, logged
from helpers.writers import made_rows, number_of, write_record, write_slowly

from tbrm_trl import load_rollouts
from tbrm_trl.sources.records import Part, RecordFolder
from tbrm_trl.sources.saved_rollouts import rollout_files

# Windows of 4 rows.
RUN: dict[str, Any] = dict(
    per_device_train_batch_size=4, max_steps=4, learning_rate=0.05, num_generations=2, max_completion_length=12
)


def follow(model, tmp_path: Path, records: Path, reward_funcs=None, **options: Any):
    """A trainer that has none of the data, and what it took of each window."""
    options = {**RUN, "num_generations": 1, "train_dataset": None, "follow_timeout": 5.0, **options}
    trainer = build(model, tmp_path, reward_funcs, follow_rollouts=str(records), **options)
    trainer.taken = kept_returns(trainer, "_new_window")
    return trainer


def numbers(windows) -> list[int]:
    return [number_of(one.completion_ids) for window in windows for one in window]


def test_following_what_a_run_drew_is_that_run(llama, tmp_path):
    """A synchronous run saves its rollouts; a second one follows them, and makes the same updates and metrics."""
    functions = [letters, digits]
    options = dict(reward_weights=[1.0, 0.5], reward_pessimism=0.5, log_completions=True)
    first = build(llama, tmp_path / "first", functions, save_rollouts=True, **RUN, **options)
    drawn = kept_returns(first, "_new_window")
    first.train()
    records = tmp_path / "records"
    records.mkdir()
    for number, file in enumerate(rollout_files(Path(first.args.output_dir) / "rollouts")):
        shutil.copy(file, records / f"copy-{number}.parquet")
    for folder in records, tmp_path:  # as a data set too
        assert load_rollouts(folder)["completion_ids"][:] == load_rollouts(tmp_path / "first/out")["completion_ids"][:]

    second = follow(llama, tmp_path / "second", records, functions, num_generations=2, save_rollouts=True, **options)
    second.train()

    def row(one):
        return one.completion_ids.tolist(), one.reward, one.rewards, one.end, one.policy_step, one.group_id

    for ours, theirs in zip(second.taken, drawn, strict=True):
        assert sorted(map(str, map(row, ours))) == sorted(map(str, map(row, theirs)))
    assert second.losses == pytest.approx(first.losses, rel=1e-5)
    logs = [[{**entry} for entry in one.state.log_history if "loss" in entry] for one in (first, second)]
    for theirs, ours in zip(*logs, strict=True):
        new = {name for name in ours if name not in theirs}
        assert new == {
            "staleness/mean", "staleness/max", "staleness/mixed", "rollouts/queue", "rollouts/learner_wait_time",
            "rollouts/versions",
        }  # fmt: skip
        for name in set(theirs) - {"step_time", "generation_time", "rewards_time", "reference_time"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6, nan_ok=True), name
        assert ours["staleness/max"] == 0 and ours["rollouts/versions"] == 1
    for name in ("prompt", "completion"):
        assert list(second._logs[name]) == list(first._logs[name])
    tables = [load_rollouts(one.args.output_dir, unrewarded=True).to_dict() for one in (first, second)]
    assert {k: v for k, v in tables[0].items() if "version" not in k} == {
        k: v for k, v in tables[1].items() if "version" not in k
    }
