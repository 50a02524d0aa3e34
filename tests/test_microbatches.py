"""An update divided into micro-batches, by rows or by tokens, has the loss and the gradient of one that is not."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from common.launch import launcher_of
from common.tiny import save
from oracle import distance
from scripted import script, scripted_trainer
from test_distributed import HOW
from test_oracle import TOLERANCE, check
from test_soft_values import one_update
from test_two_processes import launch, strip

from tbrm_trl import TBRMConfig
from tbrm_trl.trajectory import UpdateRow


def divided(trainer) -> list[list[list[UpdateRow]]]:
    """Keeps the micro-batches of each update."""
    divide, updates = trainer._microbatches_of, []
    trainer._microbatches_of = lambda uses: updates.append(divide(uses)) or updates[-1]
    return updates


def forwards(trainer) -> list[int]:
    """Keeps the number of rows of each forward pass of the policy with gradient."""
    rows: list[int] = []

    def count(module, args, kwargs):
        if torch.is_grad_enabled() and "action_mask" in kwargs:
            rows.append(len(kwargs["input_ids"]))

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    return rows


@pytest.mark.parametrize("budget", [1, 40, 60, 10_000])
def test_a_token_budget_changes_neither_loss_nor_gradient(budget, tmp_path):
    trainer = scripted_trainer(
        save(tmp_path / "model"), script(unscored=(3,)), tmp_path, max_tokens_per_microbatch=budget
    )
    updates, rows = divided(trainer), forwards(trainer)
    check(trainer)
    (batches,) = updates
    assert rows == [len(batch) for batch in batches] and sum(rows) == 8
    assert len(batches) == {1: 8, 10_000: 1}.get(budget, len(batches)) and (budget > 1000 or len(batches) > 2)
    widths = [max(map(len, batch)) for batch in batches]
    assert widths == sorted(widths, reverse=True)
    assert all(len(batch) == 1 or len(batch) * width <= budget for batch, width in zip(batches, widths, strict=True))
    assert len(trainer.losses) == 1  # one step of the Trainer, whatever the number of micro-batches
    tokens = sum(len(use) for batch in batches for use in batch)
    padded = sum(len(batch) * width for batch, width in zip(batches, widths, strict=True))
    assert trainer.state.log_history[0]["pad_fraction"] == pytest.approx(1 - tokens / padded, abs=1e-6)
    assert trainer.state.log_history[0]["left_out/unscored"] == pytest.approx(1 / 8)


def test_packed_micro_batches_are_filled_without_padding(tmp_path):
    trainer = scripted_trainer(
        save(tmp_path / "model"), script(), tmp_path, max_tokens_per_microbatch=90, padding_free=True
    )
    updates = divided(trainer)
    check(trainer)
    tokens = [sum(map(len, batch)) for batch in updates[0]]
    assert max(tokens) <= 90 and len(tokens) == 2  # padded, they would take three


def test_router_loss_is_the_mean_over_rows(tmp_path):
    """A mixture of experts: each micro-batch's auxiliary loss counts by its rows."""
    folder = save(tmp_path / "model", "qwen3_moe")
    trainer = scripted_trainer(folder, script(), tmp_path, max_tokens_per_microbatch=70, router_aux_loss_coef=0.3)
    seen, take = [], trainer._loss

    class Watch:
        def __getattr__(self, name):
            return getattr(take, name)

        def __call__(self, uses, *args, **kwargs):
            seen.append((len(uses), take(uses, *args, **kwargs)))
            return seen[-1][1]

    trainer._loss = Watch()
    trainer.train()
    assert len({rows for rows, _ in seen}) > 1
    residual = sum(one.loss.sum().item() for _, one in seen) / 8
    auxiliary = sum(rows * one.aux_loss.item() for rows, one in seen) / 8
    assert trainer.losses[0] == pytest.approx(residual + 0.3 * auxiliary, rel=TOLERANCE)


@pytest.mark.parametrize("budget", [60, 25])
def test_groups_under_a_token_budget(budget, tmp_path):
    """Whole where each fits; else one pass beforehand gives their value, and any split the same gradient."""
    folder = save(tmp_path / "model", "llama")
    options = dict(soft_value="group", num_generations=2)
    plain = one_update(folder, tmp_path, **options)
    budgeted = one_update(folder, tmp_path, **options, max_tokens_per_microbatch=budget)
    assert distance(budgeted.gradient, plain.gradient) <= TOLERANCE
    assert budgeted.loss == pytest.approx(plain.loss, rel=TOLERANCE)
    beforehand = [use.value is not None for use in budgeted.uses]
    assert all(beforehand) if budget == 25 else not any(beforehand)


@pytest.mark.parametrize("soft_value", ["calibrated", "group"])
def test_rows_of_similar_length_share_a_microbatch(soft_value, tmp_path):
    """The longest first; groups that fit into a micro-batch stay whole, and are sorted by their longest."""
    together = 2 if soft_value == "group" else 1
    folder = save(tmp_path / "model", "llama")
    watched: list[list[list[UpdateRow]]] = []
    seen = one_update(
        folder, tmp_path, soft_value=soft_value, num_generations=2, per_device_train_batch_size=2,
        gradient_accumulation_steps=4, watch=lambda trainer: watched.append(divided(trainer)),
    )  # fmt: skip
    batches = watched[0][0]
    assert [len(batch) for batch in batches] == [2] * 4
    lengths = [len(use) for batch in batches for use in batch]
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
    with pytest.raises(ValueError, match=r"`optim='adalomo'` with `max_tokens_per_microbatch` is refused: it steps in"):
        TBRMConfig(str(tmp_path), use_cpu=True, max_tokens_per_microbatch=9, optim="adalomo")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", pytest.param("zero2", marks=pytest.mark.launch), "zero3"])
def test_every_process_runs_as_many_micro_batches(kind, tmp_path):
    """The first process has the long rows and needs more; the second divides its own further, and adds no filler."""
    folder, rows = save(tmp_path / "model"), script(tools=False)
    rows[:4] = [replace(row, prompt=row.prompt + "x" * 20) for row in rows[:4]]
    rows_file = tmp_path / "rows.json"
    rows_file.write_text(json.dumps([asdict(row) for row in rows]))
    options = dict(max_tokens_per_microbatch=80, num_iterations=2, max_steps=2, learning_rate=0.01,
                   lr_scheduler_type="constant")  # fmt: skip
    arguments = [folder, str(rows_file), str(tmp_path), json.dumps(options)]
    launch(arguments, launcher_of(kind), "microbatch_processes.py")
    seen = torch.load(tmp_path / "seen.pt", weights_only=False)
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
        assert distance(strip(seen["gradients"]), one.recorder.gradients[0]) <= TOLERANCE
        assert reduced == [1, 1]  # the model's one bucket, in each of two updates
    for theirs, ours in zip(one.state.log_history, seen["log"], strict=False):
        if "grad_norm" in theirs:
            assert float(ours["grad_norm"]) == pytest.approx(float(theirs["grad_norm"]), rel=1e-3)
