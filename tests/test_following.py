"""Rollouts from other writers: taken in order, once, and trained on like a run's own. Errors name file and row."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from common.launch import ROOT
from datasets import Dataset
from helpers.resume_processes import printed, start
from helpers.runs import DATA, PROMPTS, build, config, digits, kept_returns, letters, logged
from helpers.writers import made_rows, number_of, write_record, write_slowly

from tbrm_trl import load_rollouts
from tbrm_trl.run_log import read_lines, trajectory_ids
from tbrm_trl.sources import records
from tbrm_trl.sources.records import Part, RecordFolder
from tbrm_trl.sources.saved_rollouts import column_of, record_name, rollout_files
from tbrm_trl.trajectory import Source

LOGGED = Dataset.from_list([{"prompt": p, "completion": "a", "reward": 1.0} for p in PROMPTS])
# Windows of 4 rows.
RUN: dict[str, Any] = dict(
    per_device_train_batch_size=4, max_steps=4, learning_rate=0.05, num_generations=2, max_completion_length=12
)


def follow(model, tmp_path: Path, records: Path, reward_funcs=None, **options: Any):
    """A trainer without data that follows records, and keeps the trajectories that it takes for each window."""
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
        return (
            one.completion_ids.tolist(),
            one.reward,
            sorted(one.rewards.items()),
            one.end,
            one.policy_step,
            one.group_id,
        )

    for ours, theirs in zip(second.taken, drawn, strict=True):
        assert sorted(map(str, map(row, ours))) == sorted(map(str, map(row, theirs)))
    assert second.losses == pytest.approx(first.losses, rel=1e-5)
    logs = [[{**entry} for entry in one.state.log_history if "loss" in entry] for one in (first, second)]
    for theirs, ours in zip(*logs, strict=True):
        new = {name for name in ours if name not in theirs}
        assert new == {
            "staleness/mean", "staleness/max", "staleness/mixed", "rollouts/queue", "rollouts/learner_wait_time",
            "rollouts/versions", "rollouts_time",
        }  # fmt: skip
        for name in set(theirs) - {"step_time", "generation_time", "rewards_time", "reference_time", "epoch"}:
            expected = theirs[name] if theirs[name] is None else pytest.approx(theirs[name], rel=1e-4, abs=1e-6)
            assert ours[name] == expected, name
        assert ours["staleness/max"] == 0 and ours["rollouts/versions"] == 1
    for name in ("prompt", "completion"):
        assert list(second._logs[name]) == list(first._logs[name])
    tables = [load_rollouts(one.args.output_dir, unrewarded=True).to_dict() for one in (first, second)]
    assert str(tables[0]) == str(tables[1])  # with NaN


def test_the_documents_writer_is_followed(llama, tmp_path, monkeypatch):
    """It runs the document's program with its token ids, then the document's function with other rows."""
    page = (ROOT / "docs/asynchronous.md").read_text()
    blocks = re.findall(r"```python\n(.+?)```", page, flags=re.S)
    (program,) = (block for block in blocks if "def write_record" in block)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(program, names)
    for row in made_rows(7):
        names["write_record"](Path("records"), "mine", [row])
    trainer = follow(llama, tmp_path, tmp_path / "records", max_steps=2)
    trainer.train()
    of_program, *others = sorted((one for window in trainer.taken for one in window), key=lambda one: one.reward != 1.0)
    assert (of_program.prompt_ids.tolist(), of_program.completion_ids.tolist()) == ([5, 6], [7, 8, 1])
    assert sorted(numbers([others])) == list(range(7))


def test_replay_logged_rows_and_evaluation_beside_followed_rollouts(llama, tmp_path):
    """Windows have 2 followed and 2 logged rows. Then an update replays rows: only followed ones."""
    write_record(tmp_path / "records", "other", 0, [{**row, "policy_step": 7} for row in made_rows(16)])
    data = Dataset.from_list([*LOGGED, *({"prompt": p, "completion": None, "reward": None} for p in PROMPTS)])
    trainer = follow(
        llama, tmp_path, tmp_path / "records", letters, train_dataset=data, logged_fraction=0.5, num_iterations=2,
        replay_buffer_size=8, max_steps=6, eval_dataset=DATA.select([0]), eval_strategy="steps", eval_steps=6,
        per_device_eval_batch_size=1,
    )  # fmt: skip
    updates = kept_returns(trainer, "_collect")
    trainer.train()
    followed = [[one for one in window if one.source is Source.ROLLOUT] for window in trainer.taken]
    assert [sorted(numbers([some])) for some in followed] == [[0, 1], [2, 3], [4, 5]]
    assert [Counter(row.origin for row in update) for update in updates[:3]] == [
        {"ahead": 2, "logged": 2}, {"reused": 2, "logged": 2}, {"ahead": 2, "logged": 2},
    ]  # fmt: skip
    assert {row.origin for row in updates[3]} == {"replayed"} and {row.age for row in updates[3]} == {0}
    (entry,) = (line for line in read_lines(Path(trainer.args.output_dir) / "log.jsonl") if "eval_loss" in line)
    assert (entry["eval_policy"], entry["eval_sampler"]) == ("step 6", "transformers")
    assert "eval_reward" in entry and "eval_rollouts/queue" not in entry


@pytest.mark.parametrize("first", ["ids", "messages"])
def test_writers_of_text_and_of_messages_in_one_table(first, llama, tmp_path):
    rows, there = made_rows(8), tmp_path / "records"
    said = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    forms = {"ids": rows[:4], "messages": [{**row, **said} for row in rows[4:]]}
    for writer, form in zip("ab", (first, *(set(forms) - {first})), strict=True):
        for number in range(2):
            write_record(there, writer, number, forms[form][2 * number : 2 * number + 2])
    trainer = follow(llama, tmp_path, there, max_steps=2, log_completions=True, logging_steps=1)
    trainer.train()
    assert sorted(numbers(trainer.taken)) == list(range(8))
    assert {prompt[0]["role"] for prompt in trainer._logs["prompt"]} == {"user"}


def test_a_look_at_the_folder_reads_no_name_of_a_file_that_was_taken(tmp_path, monkeypatch):
    """In a run of weeks there are a hundred thousand of them."""
    for number in range(30):
        write_record(tmp_path, "w", number, made_rows(1))
    reader, read = folder(tmp_path), []
    assert taken(reader, 29) == [0] * 29 and taken(reader, 1) == [0]
    monkeypatch.setattr(records, "record_name", lambda file: read.append(file.name) or record_name(file))
    for expected in (["w-000029.parquet"], []):  # the last file once more, to see that it was taken
        read.clear()
        assert reader._waiting() == [] and read == expected
    reader.restore({})
    assert len(reader._waiting()) == 30


# ---- which rows, in which order --------------------------------------------------------------------------------------


def test_rows_are_taken_once_in_order_however_files_are_cut(llama, tmp_path, capsys):
    """Windows have 4 rows, from files of 1 to 7 rows that are written while the learner waits for them."""
    records, rows = tmp_path / "records", made_rows(32)
    trainer = follow(llama, tmp_path, records, max_steps=8)
    assert f"each generation takes 4 rollouts from {records}, for 1 update(s) on 4 each" in capsys.readouterr().out
    writer = threading.Thread(target=write_slowly, args=(records, rows, 7, 0, 0.01))
    trainer._followed.watch = lambda: None if writer.ident else writer.start()  # it starts when the learner waits
    trainer.train()
    writer.join()
    assert [sorted(numbers([window])) for window in trainer.taken] == [list(range(4 * w, 4 * w + 4)) for w in range(8)]
    rewards = {number_of(one.completion_ids): one.reward for window in trainer.taken for one in window}
    assert [rewards[k] for k in range(32)] == pytest.approx([row["reward"] for row in rows])
    waited = logged(trainer, "rollouts/learner_wait_time")
    assert len(waited) == 8 and waited[0] >= 0.1
    assert logged(trainer, "rewards/reward/mean") == logged(trainer, "reward")


def folder(tmp_path: Path, **given: Any) -> RecordFolder:
    return RecordFolder(
        tmp_path, lambda row: {**row, "loss_mask": [True] * len(row["completion_ids"]), "end": "eos"}, **given
    )


def taken(reader: RecordFolder, rows: int) -> list[int]:
    return [number_of(record.trajectory.completion_ids) for record in reader.take(rows)[1]]


def test_a_slow_writer_loses_nothing_and_a_cursor_goes_on_anywhere(tmp_path):
    """Of two writers, `a` is late; its rows come in turn once written. A new reader goes on in the middle of a file."""
    rows = made_rows(12)
    for number in range(3):
        write_record(tmp_path, "b", number, rows[2 * number : 2 * number + 2])
    reader = folder(tmp_path)
    found, _ = reader.take(3)
    assert found.parts == [Part("b-000000.parquet", 0, 2), Part("b-000001.parquet", 0, 1)]
    assert (found.rows, found.versions, found.functions) == (3, 1, [])
    write_record(tmp_path, "a", 0, rows[6:9])
    again = folder(tmp_path)
    again.restore(reader.state())
    for one in (reader, again):
        assert taken(one, 4) == [3, 6, 7, 8]  # the open file first, then the lowest number present
        assert one.state() == {"next": {"a": 1, "b": 2}, "open": None, "functions": []}
    write_record(tmp_path, "a", 2, rows[9:])  # its file 1 is not there yet
    reader.timeout = 0.0
    with pytest.raises(TimeoutError, match=r"2 of the 4 rows .* File 1 of the writer 'a' is missing, and its file 2"):
        reader.take(4)
    assert reader.state() == again.state()
    write_record(tmp_path, "a", 1, rows[:1])
    assert taken(reader, 6) == [0, 9, 10, 11, 4, 5]


def test_two_files_of_one_number_are_refused(tmp_path):
    write_record(tmp_path, "a", 0, made_rows(2))
    shutil.copy(tmp_path / "a-000000.parquet", tmp_path / "a-0.parquet")
    with pytest.raises(ValueError, match=r"two files 0 of the writer 'a', a-0.parquet and a-000000.parquet"):
        folder(tmp_path).take(2)


def test_shares_of_processes_are_the_windows_rows_in_order(tmp_path):
    for number, size in enumerate((1, 5, 2, 4)):
        write_record(tmp_path, "w", number, made_rows(12)[sum((1, 5, 2, 4)[:number]) :][:size])
    reader = folder(tmp_path)
    reader.take(2)
    found, records = reader.take(9)
    for processes in (1, 3, 9):
        size = 9 // processes
        shares = [reader.read(found.share(p * size, (p + 1) * size)) for p in range(processes)]
        assert [record.name for share in shares for record in share] == [record.name for record in records]
        assert {len(share) for share in shares} == {size}


def test_a_reader_that_waits_says_so_and_hears_that_nothing_will_come(tmp_path, monkeypatch):
    monkeypatch.setattr("tbrm_trl.sources.records._SAY", 0.0)
    said: list[str] = []

    def watch():
        if len(said) == 2:
            raise RuntimeError("The writer is no more.")

    with pytest.raises(RuntimeError, match="no more"):
        folder(tmp_path / "none", watch=watch, say=said.append).take(8)
    assert all(line.startswith("Waiting for rollouts since 0 s: 0 of the 8 rows") for line in said)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader(llama, tmp_path_factory):
    """A function that reads 4 rows of a folder with a trainer's reader, which knows what its policy can draw."""
    place = tmp_path_factory.mktemp("reader")
    reader = follow(llama, place, place / "none")._followed

    def read(folder: Path) -> None:
        reader.folder, reader.timeout = folder, 0.0
        reader.restore({})
        reader.take(4)

    return read


ROW = dict(prompt_ids=[2, 5], completion_ids=[7, 8, 1], reward=0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(completion_ids=None), "it has no `completion_ids`"),
        (dict(completion_ids=[]), "`completion_ids` is empty"),
        (dict(completion_ids=[7, 4000]), "outside the model's vocabulary"),
        (dict(completion_ids=[7, 1, 8]), "ends a completion"),
        (dict(loss_mask=[1, 1]), "`loss_mask` has 2 entries for 3 completion ids"),
        (dict(reward=math.inf), "`reward` is inf"),
        (dict(reward=1e30), "With this beta it may reach"),
        ({"rewards/a": -math.inf}, "`rewards/a` is -inf"),
        (dict(end="stop"), "`end` is 'stop'"),
        (dict(end="length"), '`end` is "length", but'),
        (dict(policy_step=2, first_policy_step=3), "`first_policy_step` is 3 and `policy_step` 2"),
        (dict(policy_step=None, first_policy_step=0), "`first_policy_step` is 0 and `policy_step` None"),
        (dict(policy_step=-5), "`first_policy_step` is -5 and `policy_step` -5"),
        (dict(completion_ids=[7, None, 1]), "`completion_ids` holds None"),
        (dict(loss_mask=[1, None, 1]), "`loss_mask` holds None"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(changes, message, reader, tmp_path):
    good = {**dict.fromkeys(changes), **ROW}
    write_record(tmp_path / "good", "other", 0, [good] * 4)
    reader(tmp_path / "good")
    write_record(tmp_path / "bad", "other", 0, [good, {**good, **changes}, good, good])
    with pytest.raises(ValueError, match=f"Row 1 of .*bad/other-000000.parquet: .*{message}"):
        reader(tmp_path / "bad")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (dict(prompt="a", completion="b", reward=1.0), "it has no column `prompt_ids`"),
        (dict(prompt_ids=[2], completion_ids=[1]), "neither a column `reward` nor"),
        ({"prompt_ids": [2], "completion_ids": [1], "rewards/a": 1.0}, "no column `reward`"),
        ({**ROW, "reward": "good"}, "its column `reward` holds string"),
        ({**ROW, "metrics/turns": "two"}, "its column `metrics/turns` holds string"),
        ({**ROW, "completion_ids": ["7"] * 3 + ["x"]}, "its column `completion_ids` holds list<.*string>"),
    ],
)
def test_columns_that_cannot_be_read_are_refused(row, message, reader, tmp_path):
    write_record(tmp_path, "other", 0, [row] * 4)
    with pytest.raises(ValueError, match=f"other-000000.parquet: .*{message}"):
        reader(tmp_path)


def test_a_column_that_is_there_twice_is_refused(reader, tmp_path):
    file = write_record(tmp_path, "other", 0, [ROW] * 4)
    table = pq.read_table(file)
    pq.write_table(table.append_column("reward", table["reward"]), file, write_page_checksum=True)
    with pytest.raises(ValueError, match=r"other-000000\.parquet: it has the column `reward` twice"):
        reader(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-30]), "is no whole Parquet file"),
        (lambda file: file.write_bytes(b""), "is no whole Parquet file"),
        (lambda file: file.write_bytes(_flipped(file.read_bytes())), "is damaged"),
        (
            lambda file: write_record(file.parent, "other", 0, made_rows(4), {_VERSION: "99"}),
            "a later version of tbrm-trl",
        ),
        (lambda file: file.rename(file.with_name("step-00000000-process-0.parquet")), "is not named as records are"),
    ],
)
def test_files_that_are_not_whole_or_foreign_are_refused(spoil, message, reader, tmp_path):
    file = write_record(tmp_path, "other", 0, made_rows(4))
    pq.write_table(pq.read_table(file), file, write_page_checksum=True, compression="none")
    reader(tmp_path)
    spoil(file)
    with pytest.raises(ValueError, match=message) as refused:
        reader(tmp_path)
    assert str(file.parent) in str(refused.value)


_VERSION = "tbrm_trl.rollouts.version"


def _flipped(content: bytes) -> bytes:
    """The file with one bit of its first column changed, which leaves its footer whole."""
    return content[:60] + bytes([content[60] ^ 1]) + content[61:]


def test_groups_must_stand_together(tmp_path):
    rows = made_rows(8, group_size=2)
    write_record(tmp_path, "other", 0, rows[:3] + rows[4:] + rows[3:4])
    with pytest.raises(ValueError, match=r"Row 3 of .* has another prompt than Row 2 of .*\(num_generations\)"):
        folder(tmp_path, group_size=2).take(4)


def test_a_replay_buffer_asks_for_ages(tmp_path):
    write_record(tmp_path, "other", 0, [{**row, "policy_step": None} for row in made_rows(4)])
    assert taken(folder(tmp_path), 4) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="no `policy_step`, from which `replay_buffer_size`"):
        folder(tmp_path, needs_steps=True).take(4)


ACTOR = dict(rollouts="async", async_server="http://localhost:1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_steps=-1), "needs `max_steps`"),
        (dict(rollout_pool=4), "Use one of the two"),
        (dict(reference="previous", soft_value="group", num_generations=2), "has no previous one"),
        (dict(replay_buffer_size=8, num_iterations=2, replay_max_age=2), "out of the order of their ages"),
        (dict(soft_value="optimal"), "belongs to a row of the training set"),
        (dict(steps_per_generation=4, max_staleness=2), "Set it to 3 or more"),
        (dict(follow_timeout=0), "positive number of seconds"),
        (dict(async_server="localhost:8000"), "must begin with http:// or https://"),
        (dict(publish_policy=True, generation_kwargs={"min_new_tokens": 2}), "which does not know transformers' names"),
        (dict(follow_rollouts=None, max_staleness=2), "`max_staleness=2` has no effect"),
        (dict(rollout_func=lambda prompts, trainer: {}), "`follow_rollouts` with a `rollout_func` is refused"),
        (dict(train_dataset=LOGGED), "every row of the training set is logged"),
        (dict(ACTOR), "the run's actor writes to a folder of its own"),
        (dict(ACTOR, follow_rollouts=None, publish_policy=False), "draws from the policy's published versions"),
        (
            dict(ACTOR, follow_rollouts=None, train_dataset=DATA.to_iterable_dataset()),
            "without streaming",
        ),
    ],
)
def test_what_cannot_follow_is_refused(options, message, llama, tmp_path):
    given = {**RUN, "num_generations": 1, "train_dataset": None, "follow_rollouts": str(tmp_path), **options}
    with pytest.raises(ValueError, match=message):
        build(llama, tmp_path, **given)


def test_constants_that_other_policies_data_mislead_are_warned_of(recwarn):
    config(follow_rollouts="somewhere", max_steps=1, soft_value="zero")
    assert any("rollouts that run ahead" in str(one.message) for one in recwarn)


# ---- rewards ---------------------------------------------------------------------------------------------------------


def named(row: dict, letters: float | None, digits: float | None, reward: float | None = 9.0) -> dict:
    return {**row, "rewards/letters": letters, "rewards/digits": digits, "reward": reward}


def test_rewards_by_function_are_summed_anew_and_rows_without_any_are_unscored(llama, tmp_path):
    """By hand, with weights 2 and 0.5: the writer's own sum does not count. A missing reward is not 0."""
    verdicts = [(1.0, 4.0), (None, 2.0), (math.nan, None), (-1.0, None)]
    rows = [named(row, *pair) for row, pair in zip(made_rows(4), verdicts, strict=True)]
    write_record(tmp_path / "records", "other", 0, rows)
    trainer = follow(llama, tmp_path, tmp_path / "records", [letters, digits], reward_weights=[2.0, 0.5], max_steps=1)
    trainer.train()
    rewards = {number_of(one.completion_ids): one.reward for one in trainer.taken[0]}
    assert [rewards[k] for k in (0, 1, 3)] == [4.0, 1.0, -2.0] and math.isnan(rewards[2])
    (entry, *_) = trainer.state.log_history
    assert entry["left_out/unscored"] == 0.25
    assert (entry["rewards/letters/mean"], entry["rewards/digits/mean"], entry["reward"]) == (0.0, 3.0, 1.0)


def test_without_functions_the_writers_sum_counts_and_its_parts_are_logged(llama, tmp_path):
    verdicts = [(1.0, 4.0, 7.0), (None, 2.0, 1.0), (1.0, 1.0, None), (3.0, None, math.nan)]
    rows = [named(row, *of) for row, of in zip(made_rows(4), verdicts, strict=True)]
    write_record(tmp_path / "records", "other", 0, rows)
    trainer = follow(llama, tmp_path, tmp_path / "records", max_steps=1)
    trainer.train()
    rewards = {number_of(one.completion_ids): one.reward for one in trainer.taken[0]}
    assert [rewards[k] for k in (0, 1)] == [7.0, 1.0] and math.isnan(rewards[2]) and math.isnan(rewards[3])
    (entry, *_) = trainer.state.log_history
    assert (entry["reward"], entry["rewards/reward/mean"], entry["left_out/unscored"]) == (4.0, 4.0, 0.5)
    assert (entry["rewards/letters/mean"], entry["rewards/digits/mean"]) == (1.0, 3.0)  # over scored rows


def test_what_writers_logged_is_logged(llama, tmp_path):
    """A metric is logged as the mean over the rows that have it, a column of the completions for all rows."""
    records = tmp_path / "records"
    rows = made_rows(4)
    for number, row in enumerate(rows):
        row |= {
            "metrics/seconds": float(number),
            "metrics/rare": 7.0 if number == 2 else None,
            "extra/judge": f"j{number}",
        }
    write_record(records, "other", 0, rows)
    trainer = follow(llama, tmp_path, records, max_steps=1, log_completions=True, save_rollouts=True, logging_steps=1)
    trainer.train()
    (entry,) = [one for one in trainer.state.log_history if "loss" in one]
    assert (entry["seconds"], entry["rare"]) == (1.5, 7.0)
    assert sorted(trainer._logs["extra"]["judge"]) == ["j0", "j1", "j2", "j3"]
    assert not [name for name in load_rollouts(trainer.args.output_dir).column_names if "seconds" in name]


def test_text_that_is_not_unicode_is_kept():
    """`json.loads` returns such text for half of an emoji that a policy has escaped."""
    assert column_of(["a", "\ud83d", None]).to_pylist() == ['"a"', '"\\ud83d"', None]


def test_records_are_read_back_as_data(tmp_path):
    """Records may have only rewards by function, or a row that their writer could not judge."""
    rows = [named(row, 1.0, 0.5) for row in made_rows(4)]
    write_record(tmp_path / "by_function", "other", 0, [{k: v for k, v in r.items() if k != "reward"} for r in rows])
    assert load_rollouts(tmp_path / "by_function")["rewards/letters"][:] == [1.0] * 4
    write_record(tmp_path / "unjudged", "other", 0, [{**row, "reward": math.nan} for row in rows[:1]] + rows[1:])
    with pytest.warns(UserWarning, match="1 of 4 saved rollouts have no reward"):
        assert len(load_rollouts(tmp_path / "unjudged")) == 3


def test_other_functions_than_the_learners_or_those_before_are_refused(tmp_path):
    rows = [named(row, 1.0, 1.0) for row in made_rows(8)]
    write_record(tmp_path, "other", 0, rows[:4])
    write_record(tmp_path, "other", 1, [{k: v for k, v in row.items() if k != "rewards/letters"} for row in rows[4:]])
    with pytest.raises(
        ValueError, match="are those of letters, digits, and the reward functions of this run are letters"
    ):
        folder(tmp_path, functions=["letters"]).take(4)
    reader = folder(tmp_path)
    reader.take(4)
    with pytest.raises(ValueError, match=r"other-000001.* and those of the files before it of letters, digits"):
        reader.take(4)


# ---- staleness -------------------------------------------------------------------------------------------------------


def test_staleness_counts_from_the_first_token_to_the_use(llama, tmp_path):
    """By hand. Windows of 4 rows and two updates: each row is used one or two steps after the window's first."""
    steps = [(0, 0), (0, 0), (0, 0), (0, 0), (0, 1), (2, 2), (None, None), (9, 9)]  # first token, last token
    rows = [
        {**row, "first_policy_step": first, "policy_step": last}
        for row, (first, last) in zip(made_rows(8), steps, strict=True)
    ]
    write_record(tmp_path / "records", "other", 0, rows)
    trainer = follow(
        llama,
        tmp_path,
        tmp_path / "records",
        per_device_train_batch_size=2,
        steps_per_generation=2,
        shuffle_dataset=False,
    )
    updates = kept_returns(trainer, "_collect")
    trainer.train()
    for step, update in enumerate(updates):
        for row in update:
            first, last = steps[number_of(row.trajectory.completion_ids)]
            assert row.staleness == (None if first is None else max(step - first, 0))
            assert row.origin == ("fresh" if first == last == step - step % 2 else "ahead")
    for entry, update in zip(trainer.state.log_history, updates, strict=False):
        known = [row.staleness for row in update if row.staleness is not None]
        assert entry.get("staleness/mean") == (pytest.approx(sum(known) / len(known)) if known else None)
        assert entry.get("staleness/max") == max(known, default=None)
        assert ("kl" in entry) == any(row.origin == "fresh" for row in update)
    assert logged(trainer, "rollouts/versions") == [1, 5] and logged(trainer, "rollouts/queue") == [1, 0]


def test_a_step_that_comes_again_after_a_resume_is_another_version(llama, tmp_path, monkeypatch):
    rows = [
        {**row, "policy_version": name} for row, name in zip(made_rows(4), ["now", "then", "now", None], strict=True)
    ]
    write_record(tmp_path / "records", "other", 0, rows)
    trainer = follow(llama, tmp_path, tmp_path / "records", max_steps=1)
    monkeypatch.setattr(type(trainer), "_policy_version", "now")
    updates = kept_returns(trainer, "_collect")
    trainer.train()
    origins = {number_of(row.trajectory.completion_ids): row.origin for row in updates[0]}
    assert origins == {0: "fresh", 1: "ahead", 2: "fresh", 3: "fresh"}


def ids_of(row: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(row["prompt_ids"]), torch.tensor(row["completion_ids"])


# ---- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.launch
@pytest.mark.parametrize("processes", [1, 2])
def test_kills_at_random_moments_lose_and_repeat_no_row(processes, qwen2, tmp_path):
    """A learner and a writer, each in processes of its own, are killed in turn and started again until the end.

    `output_dir/updates` is the history of trained rows. 16 updates on windows of 8 rows with two updates each take rows
    0 to 63, each in its window and once. After each kill there are more rows, so that no learner ends too early.
    """
    rng, rows = random.Random(processes), made_rows(70, vocabulary=60)
    records, out = tmp_path / "records", tmp_path / "out"
    options = dict(
        records=None, data=None, follow_rollouts=str(records), replay_buffer_size=0, num_iterations=1, max_steps=16,
        save_steps=2,
    )  # fmt: skip
    case = "followed" if processes == 1 else "two, followed"
    write = [sys.executable, str(ROOT / "tests/helpers/writers.py"), records, tmp_path / "rows.json", "5", "7", "0.2"]
    learners: list = []

    def made() -> int:
        lines = read_lines(out / "log.jsonl") if (out / "log.jsonl").exists() else []
        return max((line["step"] for line in lines), default=0)

    try:
        for there in (24, 40, 56, 70):
            (tmp_path / "rows.json").write_text(json.dumps(rows[:there]))
            writer = subprocess.Popen(write)
            time.sleep(rng.uniform(0.5, 1.5))
            writer.kill()
            writer.wait()
            writer = subprocess.Popen(write)
            learners = start(tmp_path, case, qwen2, resume="auto", **options)
            if there == len(rows):
                break
            goal = min(made() + rng.randint(2, 5), (there - 4) // 8 * 2)
            while made() < goal:
                assert all(one.is_alive() for one in learners), printed(tmp_path)
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.3))
            rng.choice(learners).kill()
            for one in learners:
                one.kill()
                one.join()
        for one in learners:
            one.join(120)
        assert [one.exitcode for one in learners] == [0] * processes, printed(tmp_path)
    finally:
        for one in [writer, *learners]:
            one.kill()

    numbers_of = dict(zip(trajectory_ids(list(map(ids_of, rows)))[0], range(len(rows)), strict=True))
    trained: dict[int, list[int]] = {step: [] for step in range(1, 17)}
    for process in range(processes):
        for line in read_lines(out / f"updates/process-{process}.jsonl"):
            trained[line["step"]] += [numbers_of[one] for one in line["id"]]
    for window in range(8):
        of_window = trained[2 * window + 1] + trained[2 * window + 2]
        assert sorted(of_window) == list(range(8 * window, 8 * window + 8))
