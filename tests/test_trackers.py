"""What trackers and the table of completions get, read back from their files."""

import json
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pandas
import pytest
import torch
from datasets import Dataset
from helpers import runs
from helpers.writers import made_rows, write_record
from transformers import AutoModelForCausalLM
from transformers.integrations.integration_utils import rewrite_logs

LOG = [{"prompt": text, "completion": "abc", "reward": 0.5} for text in ("1", "2", "3", "4")]
MIXED = Dataset.from_list([{"prompt": one, "completion": None, "reward": None} for one in runs.PROMPTS[:4]] + LOG)
AT_THE_REFERENCE = dict(log_completions=True, learning_rate=0.0)
Values = dict[str, list[tuple[int, float]]]  # by metric: its steps and values
OF_THE_WHOLE_RUN = ("train_runtime", "train_loss", "train_samples_per_second", "train_steps_per_second", "total_flos")


@pytest.fixture(scope="module")
def tracked(llama, tmp_path_factory):
    """A run, with an evaluation, that reports to every tracker that is installed: `make tools` has all three."""
    out = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(out / "tb"))
        patch.setenv("WANDB_DIR", str(out))
        patch.setenv("WANDB_MODE", "offline")
        trainer = runs.build(
            llama, out, runs.digits, MIXED, report_to=installed(), log_completions=True, logged_fraction=0.5,
            per_device_train_batch_size=4, eval_dataset=runs.DATA.select(range(2)), eval_strategy="steps", eval_steps=2,
            per_device_eval_batch_size=2, run_name="r", project="p",
        )  # fmt: skip
        trainer.train()
        if "wandb" in trainer.args.report_to:
            import wandb

            wandb.finish()
        yield trainer, out


def installed() -> list[str]:
    return ["tensorboard", *(name for name in ("trackio", "wandb") if find_spec(name))]


def expected(trainer) -> Values:
    """The Trainer's own log, by the names that transformers passes to trackers."""
    values: Values = {}
    for entry in trainer.state.log_history:
        for name, value in rewrite_logs(entry).items():
            values.setdefault(name, []).append((entry["step"], value))
    return {name: of_name for name, of_name in values.items() if name != "train/step"}


def in_training(trainer) -> Values:
    return {n: v for n, v in expected(trainer).items() if n.removeprefix("train/") not in OF_THE_WHOLE_RUN}


def by_step(entries) -> Values:
    """The values of each call to a tracker that keeps the update's number as a metric."""
    values: Values = {}
    for entry in entries:
        for name, value in entry.items():
            values.setdefault(name, []).append((entry.get("train/global_step"), value))
    return values


def test_tensorboard_holds_the_log(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, out = tracked
    events = EventAccumulator(str(out / "tb")).Reload()
    found = {name: [(one.step, one.value) for one in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert set(found) == set(expected(trainer))
    for name, values in expected(trainer).items():
        assert found[name] == [(step, pytest.approx(value, rel=1e-6)) for step, value in values], name


def test_trackio_holds_the_log_and_the_table(tracked):
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    trainer, out = tracked
    entries = SQLiteStorage.get_logs("p", "r")
    found = by_step(entries)
    assert {name: found[name] for name in in_training(trainer)} == in_training(trainer)
    tables = [entry["completions"]["_value"] for entry in entries if "completions" in entry]
    assert_is_table(tables[0], out / "out/completions/completions_00001.parquet")


def test_wandb_holds_the_log_and_the_table(tracked):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    trainer, out = tracked
    trainer_log, entries, summary = in_training(trainer), [], {}
    (file,) = out.glob("wandb/offline*/run-*.wandb")
    for record in map(Record.FromString, records(file.read_bytes())):
        if record.HasField("history"):
            items = record.history.item
            entries.append({one.key or "/".join(one.nested_key): json.loads(one.value_json) for one in items})
        summary |= {one.key: json.loads(one.value_json) for one in record.summary.update}
    found = by_step(entries)
    assert {name: found[name] for name in trainer_log} == trainer_log
    assert summary["train_loss"] == trainer.state.log_history[-1]["train_loss"]
    table = json.loads(next(file.parent.glob("files/media/table/completions_*")).read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert_is_table(rows, out / f"out/completions/completions_{rows[0]['step']:05d}.parquet")


def records(data: bytes) -> Iterator[bytes]:
    """The records of a file of wandb, which has no reader in Python: LevelDB's log format, after 7 bytes of header."""
    place, record = 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        part, place = data[place + 7 : place + 7 + length], place + 7 + length
        record = part if kind in (1, 2) else record + part  # 1 whole, 2 first, 3 middle, 4 last
        if kind in (1, 4):
            yield record


def assert_is_table(rows, file: Path) -> None:
    kept = pandas.read_parquet(file)
    assert list(rows[0]) == list(kept.columns) and len(rows) == len(kept) >= 4
    for row, (_, other) in zip(rows, kept.iterrows(), strict=True):
        for name, value in row.items():
            assert value == other[name] or (math.isnan(float(value)) and math.isnan(other[name])), name


def test_a_metric_without_a_value_has_no_entry(tracked):
    """TRL logs None where nothing was scored. TensorBoard drops that with a warning."""
    trainer, _ = tracked
    assert all(value is not None for entry in trainer.state.log_history for value in entry.values())


def table(trainer, step: int) -> pandas.DataFrame:
    return pandas.read_parquet(f"{trainer.args.output_dir}/completions/completions_{step:05d}.parquet")


def assert_at_the_reference(rows: pandas.DataFrame, folder: str) -> None:
    """β V is β logsumexp of the logits after the prompt, and β δ = β V − R while the policy is the reference."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for _, row in rows.iterrows():
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][0]["content"]
        with torch.no_grad():
            logits = model(**runs.TOKENIZER(prompt, return_tensors="pt")).logits[0, -1]
        assert row["soft_value"] == pytest.approx(0.1 * logits.logsumexp(-1).item(), abs=1e-5)
        assert row["advantage"] == pytest.approx(row["soft_value"] - row["reward"], abs=1e-5)


def test_the_table_has_rollouts_and_the_replayed_rows_of_the_last_update(llama, tmp_path):
    trainer = runs.build(llama, tmp_path, num_iterations=2, replay_buffer_size=4, **AT_THE_REFERENCE)
    trainer.train()
    fresh, replayed = table(trainer, 1), table(trainer, 2)
    assert fresh["origin"].tolist() == ["fresh"] * 2
    assert replayed["origin"].tolist() == ["fresh"] * 2 + ["replayed"] * 2
    assert_at_the_reference(replayed, llama)
    assert replayed["letters"].tolist()[:2] == replayed["reward"].tolist()[:2]  # the one function, of weight 1
    assert replayed["letters"].isna().tolist()[2:] == [True] * 2  # the buffer keeps the sum alone
    texts = set(zip(fresh["prompt"], fresh["completion"], strict=True))
    for _, row in replayed[2:].iterrows():
        assert (row["prompt"], row["completion"].removesuffix("<eos>")) in texts


def test_the_table_has_logged_rows_and_its_cells_stay_with_their_rows(llama, tmp_path):
    """A rollout that no function scores has no residual. A column of the user's own name stays the user's."""
    trainer = runs.build(
        llama, tmp_path, digits_of_some, MIXED, logged_fraction=0.5, per_device_train_batch_size=4, **AT_THE_REFERENCE
    )
    trainer.train()
    rows = table(trainer, 1)
    assert rows["origin"].tolist()[:2] == ["own"] * 2 and rows["origin"].isna().tolist()[2:] == [True] * 2
    assert rows["reward"].isna().tolist() == rows["advantage"].isna().tolist() == [True, False, False, False]
    assert rows["reward"].tolist()[1:] == [3.0, 0.5, 0.5]
    assert_at_the_reference(rows[1:], llama)
    assert rows["completion"].tolist()[2:] == ["abc<eos>"] * 2


def digits_of_some(completions, log_extra, **kwargs) -> list[float | None]:
    log_extra("origin", ["own"] * len(completions))
    return [None, *[3.0] * (len(completions) - 1)]


def test_columns_stay_beside_their_rows_where_a_function_failed(llama, tmp_path):
    """The function logs only in windows where it finishes. TRL alone would put old cells beside new rows."""
    called = []

    def noted(completions, log_extra, **kwargs):
        called.append(len(completions))
        if len(called) != 2:
            log_extra("note", [f"call {len(called)}"] * len(completions))
        if len(called) == 2:
            raise ZeroDivisionError
        return [0.0] * len(completions)

    trainer = runs.build(
        llama, tmp_path, [runs.letters, noted], reward_on_error="skip", max_steps=3, **AT_THE_REFERENCE
    )
    notes = []
    log = trainer.log
    trainer.log = lambda *args: (log(*args), notes.append(list(trainer._logs["extra"]["note"])))
    trainer.train()
    rows = table(trainer, 2)
    assert rows["note"].isna().all() and len(rows) == len(trainer._logs["prompt"]) and rows["noted"].isna().all()
    assert notes[-1] == ["call 3"] * len(notes[-1])


def test_evaluation_and_followed_rollouts_may_have_other_functions(llama, tmp_path):
    """The rollouts have only their reward, and the evaluation calls a function. The other's column is NaN."""
    write_record(tmp_path / "records", "other", 0, made_rows(8))
    trainer = runs.build(
        llama, tmp_path, runs.letters, eval_dataset=runs.DATA, eval_strategy="steps", eval_steps=1, max_steps=1,
        follow_rollouts=str(tmp_path / "records"), train_dataset=None, **AT_THE_REFERENCE,
    )  # fmt: skip
    trainer.train()
    table(trainer, 1)


def test_replayed_conversations_are_messages_as_the_rollouts_are(qwen2, tmp_path):
    trainer = runs.build(
        qwen2, tmp_path, train_dataset=runs.CHATS, num_iterations=2, replay_buffer_size=4, **AT_THE_REFERENCE
    )
    trainer.train()
    rows = table(trainer, 2)
    tokenizer = trainer.processing_class
    prompts = [tokenizer.apply_chat_template(list(one), add_generation_prompt=True) for one in rows["prompt"][:2]]
    rendered = {tokenizer.decode(one["input_ids"]) for one in prompts}
    assert rows["origin"].tolist()[2:] == ["replayed"] * 2
    assert {prompt[0]["content"] for prompt in rows["prompt"][2:]} <= rendered
    assert {completion[0]["role"] for completion in rows["completion"]} == {"assistant"}
