"""Updates that are not finite: what stays unchanged, what goes on, and what is recorded."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.utils import gather_object
from common.launch import allow_fsdp_on_cpu
from common.tiny import save
from datasets import Dataset
from helpers.forked import launch
from helpers.runs import before_each_update, build, log, logged
from helpers.scripted import RecordingTrainer, Row, script, scripted_trainer
from helpers.sharded import whole
from peft import LoraConfig
from transformers import TrainerCallback

from tbrm_trl import TBRMConfig, TBRMTrainer
from tbrm_trl.loss.finite import voided_unless
from tbrm_trl.run_log import SKIPPED
from tbrm_trl.skipped_updates import SkippedUpdates

UPDATES: dict[str, Any] = dict(max_steps=5, learning_rate=0.01, weight_decay=0.1, num_iterations=5)


class Inject(TrainerCallback):
    """Multiplies the first layer's output, or the gradient of it, by a number in one update of one process."""

    def __init__(self, trainer: RecordingTrainer, where: str, value: float, update: int, process: int = 0):
        self.trainer, self.where, self.value, self.update = trainer, where, value, update
        self.here = trainer.accelerator.process_index == process
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model = self.trainer.accelerator.unwrap_model(model)
        model = model.get_base_model() if hasattr(model, "peft_config") else model
        model.get_submodule("model.layers.0").register_forward_hook(self.hook)

    def hook(self, module, args, output):
        now = self.trainer.state.global_step + 1 == self.update and torch.is_grad_enabled()
        if not (self.here and now and output.requires_grad):
            return output
        if self.where == "forward":
            return output * self.value
        output.register_hook(lambda gradient: gradient * self.value)
        return output


class WithoutStep(TrainerCallback):
    """Removes the gradients before one update. A skipped update must have the same effect."""

    def __init__(self, update: int):
        self.update = update

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.update:
            model.zero_grad()


def weights_of(trainer: RecordingTrainer) -> dict[str, torch.Tensor]:
    return whole((n, p) for n, p in trainer.model.named_parameters() if p.requires_grad)


def moments_of(trainer: RecordingTrainer) -> list[torch.Tensor]:
    return [value for one in trainer.optimizer.state.values() for value in one.values()]


def equal(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, others[name]) for name, tensor in some.items())


def culprits(output_dir: Path) -> list[dict[str, Any]]:
    files = sorted((output_dir / SKIPPED).glob("process-*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines() if line]
    return [line for line in lines if "update" in line]  # others name the step to which a resumed run goes back


KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"])},
    "accumulated": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "by tokens": {"max_tokens_per_microbatch": 80},
}


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_update_is_one_without_a_step(kind, value, where, tmp_path):
    """Weights, moments and schedule go on as if the gradients of that update were removed."""
    folder, options = save(tmp_path / "model"), {**UPDATES, **KINDS[kind]}
    skips = scripted_trainer(folder, script(), tmp_path / "skips", **options)
    Inject(skips, where, value, update=2)
    before = before_each_update(skips, lambda: weights_of(skips))
    skips.train()
    plain = scripted_trainer(folder, script(), tmp_path / "plain", **options)
    plain.add_callback(WithoutStep(2))
    plain.train()
    assert equal(before[1], before[2]) and not equal(before[0], before[1]) and not equal(before[2], before[3])
    assert equal(weights_of(skips), weights_of(plain))
    assert all(map(torch.equal, moments_of(skips), moments_of(plain)))
    assert logged(skips, "learning_rate") == logged(plain, "learning_rate")
    assert logged(skips, "skipped_updates")[:5] == [0, 1, 1, 1, 1]
    losses, others = logged(skips, "loss"), logged(plain, "loss")
    assert math.isnan(losses[1]) and losses[:1] + losses[2:] == others[:1] + others[2:]
    assert "residual/rms" not in skips.state.log_history[1]
    cause = "loss" if where == "forward" else "gradient"
    assert [(one["update"], one["cause"]) for one in culprits(tmp_path / "skips")] == [(2, cause)] * 8


@pytest.mark.parametrize("offset", [False, True])
def test_an_update_in_which_nothing_counts_moves_nothing(offset, tmp_path):
    """Gradients of 0 would let Adam's momentum move the weights on, and weight decay shrink them."""
    rows = [*script(rows=16), *script(rows=16, seed=1, unscored=tuple(range(16)))]
    options = {**UPDATES, "max_steps": 4, "num_iterations": 1, "per_device_train_batch_size": 8}
    options |= {"soft_value": "calibrated", "soft_value_offset": True} if offset else {}
    trainer = scripted_trainer(save(tmp_path / "model"), rows, tmp_path / "out", **options)
    seen = before_each_update(trainer, lambda: weights_of(trainer))
    with pytest.warns(UserWarning, match="No trajectory of this update counts in the loss"):
        trainer.train()
    assert not equal(seen[1], seen[2]) and equal(seen[2], seen[3]) and equal(seen[3], weights_of(trainer))
    assert logged(trainer, "skipped_updates")[-1] == 0 and logged(trainer, "grad_norm")[2:] == [0, 0]


def test_the_logged_loss_is_the_mean_of_the_updates_taken(tmp_path):
    folder = save(tmp_path / "model")
    each = scripted_trainer(folder, script(), tmp_path / "each", **UPDATES | {"max_steps": 4})
    each.add_callback(WithoutStep(2))
    each.train()
    pairs = scripted_trainer(folder, script(), tmp_path / "pairs", logging_steps=4, **UPDATES | {"max_steps": 4})
    Inject(pairs, "forward", math.nan, update=2)
    pairs.train()
    one = logged(each, "loss")
    assert logged(pairs, "loss")[0] == pytest.approx((one[0] + one[2] + one[3]) / 3)
    assert logged(pairs, "train_loss")[0] == pytest.approx((one[0] + one[2] + one[3]) / 3)


@pytest.mark.parametrize("skipped", [2, 4])
def test_the_summary_of_a_resumed_run_is_of_its_own_updates(skipped, tmp_path):
    """At learning rate 0 every update has the same loss. One is skipped, before or after the resume."""
    options = UPDATES | {"learning_rate": 0.0, "save_strategy": "steps", "save_steps": 3}
    for resume in (None, str(tmp_path / "out" / "checkpoint-3")):
        trainer = scripted_trainer(save(tmp_path / "model"), script(), tmp_path / "out", **options)
        Inject(trainer, "forward", math.nan, update=skipped)
        trainer.train(resume)
        loss = next(loss for loss in logged(trainer, "loss") if math.isfinite(loss))
        assert logged(trainer, "train_loss") == [pytest.approx(loss, rel=1e-5)]


def test_the_trajectory_at_fault_is_written_down(tmp_path):
    """One reward has a square beyond float32. Its row is named, and no other."""
    rows = script(tools=False)
    trainer = scripted_trainer(save(tmp_path / "model"), rows, tmp_path / "out", **UPDATES | {"max_steps": 2})
    new_window = trainer._new_window

    def spoilt(given):
        window = new_window(given)
        next(one for one in window if one.completion_ids.tolist() == rows[3].completion).reward = 1e30
        return window

    trainer._new_window = spoilt
    trainer.train()
    found = culprits(tmp_path / "out")
    seen = [(one["update"], one["cause"], one["origin"]) for one in found]
    assert seen == [(1, "loss", "fresh"), (2, "loss", "reused")]
    for one in found:
        assert one["completion_ids"] == rows[3].completion and one["reward"] == 1e30 and one["loss"] == "inf"
        assert one["rewards"] == {"reward": pytest.approx(rows[3].reward)} and one["ref_log_prob"] < 0
    assert logged(trainer, "skipped_updates")[:2] == [1, 2]


def test_too_many_in_a_row_end_the_run(tmp_path):
    trainer = scripted_trainer(save(tmp_path / "model"), script(), tmp_path / "out", **UPDATES | {
        "save_strategy": "steps", "save_steps": 1, "max_skipped_updates": 2})  # fmt: skip
    for update in (2, 4, 5):
        Inject(trainer, "forward", math.nan, update)
    before = before_each_update(trainer, lambda: weights_of(trainer))
    with pytest.raises(FloatingPointError, match=r"2 updates in a row .*, the last one update 5\..*checkpoint-4"):
        trainer.train()
    assert equal(weights_of(trainer), before[3])
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_a_run_resumes_over_a_skipped_update(tmp_path):
    """From the checkpoint before the skip, which happens again, and from the one after it."""
    folder = save(tmp_path / "model")
    options = UPDATES | {"save_strategy": "steps", "save_steps": 1, "logging_steps": 3}
    first = scripted_trainer(folder, script(), tmp_path / "out", **options)
    Inject(first, "backward", math.nan, update=3)
    first.train()
    for step in (2, 3):
        again = scripted_trainer(folder, script(), tmp_path / "out", **options)
        Inject(again, "backward", math.nan, update=3)
        again.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        assert equal(weights_of(again), weights_of(first))
        assert logged(again, "skipped_updates") == logged(first, "skipped_updates") == [1, 1]  # and the summary
        assert logged(again, "loss") == logged(first, "loss")


@pytest.mark.parametrize("options", [{}, {"replay_sampling": "prioritized"}, {"num_generations": 2}], ids=str)
def test_what_is_at_fault_leaves_the_buffer(options, tmp_path):
    """It is replayed once, does not enter the weights, and is never drawn again."""
    bad = Row("bad", [60, 61, 62], [1, 1, 1], 0.5)
    rows = [*script(tools=False)[:7], bad]
    options |= {"replay_buffer_size": 64, "num_iterations": 2, "max_steps": 12, "learning_rate": 0.01}
    trainer = scripted_trainer(save(tmp_path / "model"), rows, tmp_path / "out", **options)
    replayed: list[tuple[int, int]] = []  # update, and the one before which it was generated
    collect, add = trainer._collect, trainer._replay.add

    def spoilt(trajectories):
        add([replace(t, reward=1e30) if t.completion_ids.tolist() == bad.completion else t for t in trajectories])

    def watch(given):
        update_rows = collect(given)
        found = {row.trajectory.policy_step for row in update_rows if row.trajectory.reward == 1e30}
        replayed.extend((trainer.state.global_step, step) for step in found)
        return update_rows

    trainer._replay.add, trainer._collect = spoilt, watch
    trainer.train()
    assert replayed and logged(trainer, "skipped_updates")[-1] == len({update for update, _ in replayed})
    once = [step for _, step in replayed]
    assert len(once) == len(set(once))  # never drawn again
    left = [one.policy_step for one in trainer._replay.stored if one.reward == 1e30]
    assert not set(left) & set(once)
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


def test_logs_alone(tmp_path):
    trainer = build(save(tmp_path / "model"), tmp_path, None, Dataset.from_list(log()), max_steps=4,
                    per_device_train_batch_size=4)  # fmt: skip
    Inject(trainer, "forward", math.nan, update=2)
    before = before_each_update(trainer, lambda: weights_of(trainer))
    trainer.train()
    assert equal(before[1], before[2]) and not equal(before[2], before[3])
    assert {one["origin"] for one in culprits(tmp_path / "out")} == {"logged"}


def inject_in_turn(folder: str, rows: list[dict], out: str, lora: bool, **options: Any) -> dict[str, Any]:
    """In each process: update 2 is not finite in the first process's forward, update 4 in the second's backward."""
    allow_fsdp_on_cpu()
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None
    trainer = scripted_trainer(folder, [Row(**row) for row in rows], out, peft_config=adapter,
                               per_device_train_batch_size=len(rows) // 2, **options)  # fmt: skip
    Inject(trainer, "forward", math.nan, update=2, process=0)
    Inject(trainer, "backward", math.inf, update=4, process=1)
    before = before_each_update(trainer, lambda: weights_of(trainer))
    trainer.train()
    return {
        "weights": [*before, weights_of(trainer)],
        "log": trainer.state.log_history,
        "counts": gather_object([trainer._skipped.total]),
    }


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("ddp", False),
        ("fsdp2", False),
        ("zero2", False),
        ("zero3", False),
        *(pytest.param(kind, True, marks=pytest.mark.launch) for kind in ("ddp", "fsdp2", "zero2", "zero3")),
        pytest.param("zero1", False, marks=pytest.mark.launch),
    ],
)
def test_every_process_skips_what_one_finds(kind, lora, tmp_path):
    rows = [vars(row) for row in script(tools=False)]
    options = {**UPDATES, "max_tokens_per_microbatch": 80, "max_grad_norm": 1.0}
    seen = launch("test_skipped_updates:inject_in_turn", kind, folder=save(tmp_path / "model"), rows=rows,
                  out=tmp_path / "out", lora=lora, **options)[0]  # fmt: skip
    weights = seen["weights"]
    moved = [not equal(some, others) for some, others in pairwise(weights)]
    assert moved == [True, False, True, False, True]
    assert all(tensor.isfinite().all() for tensor in weights[-1].values())
    assert seen["counts"] == [2, 2]
    entries = [entry for entry in seen["log"] if "learning_rate" in entry]
    assert [entry["skipped_updates"] for entry in entries] == [0, 1, 1, 2, 2]
    assert [float(entry["learning_rate"]) for entry in entries] == pytest.approx([0.01 * (1 - k / 5) for k in range(5)])
    found = culprits(tmp_path / "out")
    assert {(one["update"], one["cause"]) for one in found} == {(2, "loss"), (4, "gradient")}
    assert sum(one["update"] == 4 for one in found) == 8


def test_a_voided_loss():
    weight = torch.tensor(3.0, requires_grad=True)
    loss = voided_unless(torch.tensor(True), weight.square())
    loss.backward()
    assert loss.item() == 9 and weight.grad.item() == 6
    weight.grad = None
    loss = voided_unless(torch.tensor(False), weight.square())
    loss.backward()
    assert loss.item() == 0 and math.isnan(weight.grad.item())


def test_counts():
    counts = SkippedUpdates(limit=3)
    for step in (counts.took, counts.skipped, counts.skipped, counts.took):
        step()
    assert (counts.total, counts.in_a_row, counts.since_log, counts.taken_since_log) == (2, 0, 2, 2)
    assert counts.mean_over_taken(1.5) == 3.0  # of a sum over four updates, two of which are 0
    counts.logged()
    assert counts.mean_over_taken(1.5) == 1.5 and counts.total == 2


@pytest.mark.parametrize("optim", ["adalomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_in_backward_are_refused(optim, tmp_path):
    with pytest.raises(ValueError, match=rf"`optim='{optim}'` is refused: it steps in every backward"):
        TBRMConfig(str(tmp_path), use_cpu=True, optim=optim)
    with pytest.raises(ValueError, match="`max_skipped_updates=0` must be at least 1"):
        TBRMConfig(str(tmp_path), use_cpu=True, max_skipped_updates=0)


def rows_with(**values: Any) -> Dataset:
    rows = log()
    rows[3] |= values
    return Dataset.from_list([{**dict.fromkeys(values), **row} for row in rows])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reward": 1e300}, r"Row 3 of the training set: `reward` is 1e\+300\. With this beta it may reach 1e\+17"),
        ({"reward": -3e17}, r"Row 3 of the training set: `reward` is -3e\+17"),
        ({"ref_log_probs": [-1.0, math.nan], "ref_soft_value": 1.0}, r"Row 3 .*: `ref_log_probs` holds"),
        ({"ref_log_probs": [-1.0], "ref_soft_value": math.inf}, r"Row 3 .*: `ref_soft_value` holds"),
    ],
)  # fmt: skip
def test_logged_numbers_that_cannot_be_trained_on(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build("no model is loaded before that", tmp_path, None, rows_with(**values))


@pytest.mark.parametrize("precomputed", [True, False])
def test_a_reference_that_overflows_is_refused(precomputed, tmp_path):
    """It overflows on one prompt only. That prompt's row is named if it has one."""
    rows = log()
    build_it = lambda: build(save(tmp_path / "model"), tmp_path, None, Dataset.from_list(rows),  # noqa: E731
                             precompute_ref_log_probs=precomputed, per_device_train_batch_size=8)  # fmt: skip
    score = TBRMTrainer._score

    def overflowing(self, model, batch, **wanted):
        scores = score(self, model, batch, **wanted)
        if not torch.is_grad_enabled():
            first = [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
            spoilt = rows[5]["prompt_ids"] + rows[5]["completion_ids"]
            if spoilt in first:  # it is not in the rows of the start's check
                scores.soft_value[first.index(spoilt)] = math.inf
        return scores

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TBRMTrainer, "_score", overflowing)
        name = "row 5 of the training set" if precomputed else "a trajectory of this window"
        with pytest.raises(
            ValueError, match=rf"The reference gives {name} scores that are not finite: .*'V_ref\(s_1\)': inf"
        ):
            build_it().train()
    if precomputed:  # the next run begins anew, and a damaged file is refused
        build_it()
        (file,) = (tmp_path / "out" / "reference_scores").glob("*.parquet")
        table = pq.read_table(file)
        values = table["ref_soft_value"].to_pylist()
        values[2] = math.nan
        column = pa.array(values, table.schema.field("ref_soft_value").type)
        pq.write_table(table.set_column(table.schema.get_field_index("ref_soft_value"), "ref_soft_value", column), file)
        with pytest.raises(
            ValueError, match=r"parquet holds reference scores \(`ref_soft_value`\) that are not finite"
        ):
            build_it()
