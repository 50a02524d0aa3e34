"""An update has the same loss and gradient whether or not it is divided into micro-batches, by rows or by tokens."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from accelerate.utils import gather_object
from common.launch import allow_fsdp_on_cpu
from common.tiny import save
from helpers.examples import HOW
from helpers.forked import launch
from helpers.oracle import TOLERANCE, check, distance
from helpers.runs import kept_returns, one_update
from helpers.scripted import Row, script, scripted_trainer
from helpers.sharded import unwrapped
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from tbrm_trl import TBRMConfig
from tbrm_trl.trajectory import UpdateRow


def shapes_with_gradient(trainer) -> list[tuple[int, int]]:
    """A list with rows and width of each forward pass of the policy with gradient."""
    shapes: list[tuple[int, int]] = []

    def keep(module, args, kwargs):
        if torch.is_grad_enabled() and "action_mask" in kwargs:
            shapes.append(tuple(kwargs["input_ids"].shape))

    trainer.model.register_forward_pre_hook(keep, with_kwargs=True)
    return shapes


@pytest.mark.parametrize("budget", [1, 40, 60, 10_000])
def test_a_token_budget_changes_neither_loss_nor_gradient(budget, tmp_path):
    trainer = scripted_trainer(
        save(tmp_path / "model"), script(unscored=(3,)), tmp_path, max_tokens_per_microbatch=budget
    )
    updates, shapes = kept_returns(trainer, "_microbatches_of"), shapes_with_gradient(trainer)
    check(trainer)
    (batches,) = updates
    rows = [n for n, _ in shapes]
    assert rows == [len(batch) for batch in batches] and sum(rows) == 8
    assert len(batches) == {1: 8, 10_000: 1}.get(budget, len(batches)) and (budget > 1000 or len(batches) > 2)
    widths = [max(map(len, batch)) for batch in batches]
    assert widths == sorted(widths, reverse=True)
    assert all(len(batch) == 1 or len(batch) * width <= budget for batch, width in zip(batches, widths, strict=True))
    assert len(trainer.losses) == 1  # one step of the Trainer, whatever the number of micro-batches
    tokens = sum(len(row) for batch in batches for row in batch)
    padded = sum(len(batch) * width for batch, width in zip(batches, widths, strict=True))
    assert trainer.state.log_history[0]["pad_fraction"] == pytest.approx(1 - tokens / padded, abs=1e-6)
    assert trainer.state.log_history[0]["left_out/unscored"] == pytest.approx(1 / 8)


def test_packed_micro_batches_are_filled_without_padding(tmp_path):
    trainer = scripted_trainer(
        save(tmp_path / "model"), script(), tmp_path, max_tokens_per_microbatch=90, padding_free=True
    )
    updates = kept_returns(trainer, "_microbatches_of")
    check(trainer)
    tokens = [sum(map(len, batch)) for batch in updates[0]]
    assert max(tokens) <= 90 and len(tokens) == 2  # padded, they would take three


def test_router_loss_is_the_mean_over_rows(tmp_path):
    """A mixture of experts: each micro-batch's auxiliary loss counts by its rows."""
    folder = save(tmp_path / "model", "qwen3_moe")
    trainer = scripted_trainer(folder, script(), tmp_path, max_tokens_per_microbatch=70, router_aux_loss_coef=0.3)
    outputs, take = [], trainer._loss

    class Watch:
        def __getattr__(self, name):
            return getattr(take, name)

        def __call__(self, rows, *args, **kwargs):
            outputs.append((len(rows), take(rows, *args, **kwargs)))
            return outputs[-1][1]

    trainer._loss = Watch()
    trainer.train()
    assert len({rows for rows, _ in outputs}) > 1
    residual = sum(output.loss.sum().item() for _, output in outputs) / 8
    auxiliary = sum(rows * output.aux_loss.item() for rows, output in outputs) / 8
    assert trainer.losses[0] == pytest.approx(residual + 0.3 * auxiliary, rel=TOLERANCE)


@pytest.mark.parametrize("budget", [60, 25])
def test_groups_under_a_token_budget(budget, tmp_path):
    """Groups that fit stay whole. Else a pass beforehand gives their value, and any split gives the same gradient."""
    folder = save(tmp_path / "model", "llama")
    options = dict(soft_value="group", num_generations=2)
    plain = one_update(folder, tmp_path, **options)
    budgeted = one_update(folder, tmp_path, **options, max_tokens_per_microbatch=budget)
    assert distance(budgeted.gradient, plain.gradient) <= TOLERANCE
    assert budgeted.loss == pytest.approx(plain.loss, rel=TOLERANCE)
    beforehand = [row.value is not None for row in budgeted.rows]
    assert all(beforehand) if budget == 25 else not any(beforehand)


@pytest.mark.parametrize("soft_value", ["calibrated", "group"])
def test_rows_of_similar_length_share_a_microbatch(soft_value, tmp_path):
    """The longest first; groups that fit into a micro-batch stay whole, and are sorted by their longest."""
    together = 2 if soft_value == "group" else 1
    folder = save(tmp_path / "model", "llama")
    watched: list[list[list[UpdateRow]]] = []
    seen = one_update(
        folder, tmp_path, soft_value=soft_value, num_generations=2, per_device_train_batch_size=2,
        gradient_accumulation_steps=4, watch=lambda trainer: watched.append(kept_returns(trainer, "_microbatches_of")),
    )  # fmt: skip
    batches = watched[0][0]
    assert [len(batch) for batch in batches] == [2] * 4
    lengths = [len(row) for batch in batches for row in batch]
    assert len(set(lengths)) > 3
    longest = [max(lengths[i : i + together]) for i in range(0, 8, together)]
    assert longest == sorted(longest, reverse=True)
    if together == 2:
        assert all(batch[0].group == batch[1].group for batch in batches)
    padded = sum(2 * max(map(len, batch)) for batch in batches)
    assert seen.trainer.state.log_history[0]["pad_fraction"] == pytest.approx(1 - sum(lengths) / padded)


def test_the_reference_is_scored_within_the_budget(tmp_path):
    trainer = scripted_trainer(save(tmp_path / "model"), script(), tmp_path, max_tokens_per_microbatch=50)
    shapes = []
    trainer.ref_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    trainer.train()
    assert sum(rows for rows, _ in shapes) == 8  # once each
    assert len(shapes) > 2 and all(rows == 1 or rows * width <= 50 for rows, width in shapes)


def test_misuse(tmp_path):
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=1 and per_device_train_batch_size=24, the rows"):
        TBRMConfig(
            str(tmp_path), use_cpu=True, max_tokens_per_microbatch=64, per_device_train_batch_size=8,
            gradient_accumulation_steps=3,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"`max_tokens_per_microbatch=0` must be at least 1"):
        TBRMConfig(str(tmp_path), use_cpu=True, max_tokens_per_microbatch=0)


class CountReductions(TrainerCallback):
    """Counts the buckets that DDP reduces, in each update."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.counts: list[int] = []

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.counts and isinstance(self.trainer.model_wrapped, DistributedDataParallel):
            self.trainer.model_wrapped.register_comm_hook(None, self.reduce)
        self.counts.append(0)

    def reduce(self, group, bucket):
        self.counts[-1] += 1
        return allreduce_hook(group, bucket)


def count_in_each_process(folder: str, rows: list[dict], out: str, **options) -> dict[str, Any]:
    """Train in this process. Returns how often it ran and reduced, and the results."""
    allow_fsdp_on_cpu()
    trainer = scripted_trainer(
        folder, [Row(**row) for row in rows], out, per_device_train_batch_size=len(rows) // 2, **options
    )
    assert trainer.accelerator.num_processes == 2
    reductions, forwards, backwards = CountReductions(trainer), shapes_with_gradient(trainer), []
    trainer.add_callback(reductions)
    backward, divided = trainer.accelerator.backward, kept_returns(trainer, "_microbatches_of")
    trainer.accelerator.backward = lambda loss, **kwargs: backwards.append(1) or backward(loss, **kwargs)
    trainer.train()
    return {
        "processes": gather_object([(forwards, len(backwards), list(map(len, divided)), reductions.counts)]),
        "losses": gather_object([trainer.losses]),
        "gradients": trainer.recorder.gradients[0] if trainer.recorder.gradients else {},
        "log": trainer.state.log_history,
        "strategy": trainer.accelerator.distributed_type.value,
    }


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", pytest.param("zero2", marks=pytest.mark.launch), "zero3"])
def test_every_process_runs_as_many_micro_batches(kind, tmp_path):
    """The first process has long rows and needs more. The second divides its rows further instead of adding filler."""
    folder, rows = save(tmp_path / "model"), script(tools=False)
    rows[:4] = [replace(row, prompt=row.prompt + "x" * 20) for row in rows[:4]]
    options = dict(max_tokens_per_microbatch=80, num_iterations=2, max_steps=2, learning_rate=0.01,
                   lr_scheduler_type="constant")  # fmt: skip
    function = "test_microbatches:count_in_each_process"
    seen = launch(function, kind, folder=folder, rows=[asdict(row) for row in rows], out=tmp_path, **options)[0]
    assert seen["strategy"] == HOW[kind][0]
    (long, backwards, batches, reduced), (short, others_backwards, others_batches, _) = seen["processes"]
    assert batches == others_batches and min(batches) > 1
    assert len(long) == len(short) == backwards == others_backwards == sum(batches)
    assert sum(n for n, _ in long) == sum(n for n, _ in short) == 8  # four rows in each of two updates
    assert all(n == 1 or n * width <= 80 for n, width in long + short)
    assert sum(n * width for n, width in short) < 2 * 80  # alone it would have taken one micro-batch in each update

    one = scripted_trainer(folder, rows, tmp_path, **{**options, "max_tokens_per_microbatch": None})
    one.train()
    for update in range(2):
        ours = sum(losses[update] for losses in seen["losses"]) / 2
        assert ours == pytest.approx(one.losses[update], rel=TOLERANCE if update == 0 else 1e-3)
    assert abs(one.losses[1] - one.losses[0]) > 0.01
    if kind == "ddp":
        # One reduction of each bucket in an update, whatever the number of micro-batches.
        assert distance(unwrapped(seen["gradients"]), one.recorder.gradients[0]) <= TOLERANCE
        assert reduced == [1, 1]  # the model's one bucket, in each of two updates
    norms = [[float(entry["grad_norm"]) for entry in log[:2]] for log in (one.state.log_history, seen["log"])]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
