"""Metrics by hand: sums and weights that are added by name, and the residuals in the table of completions."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tbrm_trl.batch import TrajectoryScores, collate
from tbrm_trl.completions_table import CompletionsTable
from tbrm_trl.loss.metrics import (
    Recorder,
    Totals,
    evaluated_numbers,
    evaluation_loss,
    evaluation_metrics,
    microbatch_totals,
)
from tbrm_trl.loss.soft_value import ValueInputs
from tbrm_trl.loss.trajectory_loss import LossOutput
from tbrm_trl.trajectory import End, Trajectory, UpdateRow

NAN = math.nan


def totals(**pairs):
    return Totals(tuple(pairs), torch.tensor(list(pairs.values())))


def row(origin: str = "fresh", steps: tuple[int, int] = (0, 0), ref: tuple[float, float] = (0.0, 0.0),
        mask: tuple[bool, bool] = (True, True), **given: Any) -> UpdateRow:  # fmt: skip
    """A prompt of one token and two tokens after it. `steps` are the policy's at the first and at the last token."""
    first, last = steps
    trajectory = Trajectory(
        torch.tensor([5]), torch.tensor([6, 7]), torch.tensor(mask), reward=1.0, end=End.EOS, policy_step=last,
        first_policy_step=first, ref_log_probs=torch.tensor(ref),
    )  # fmt: skip
    return UpdateRow(trajectory, origin, **given)


def test_a_mean_is_over_the_weights_of_all_that_was_added():
    added = totals(kl=[6.0, 2.0], residual_mean_square=[9.0, 1.0]) + totals(kl=[0.0, 1.0], residual_mean_square=[0, 0])
    assert added.means() == {"kl": 2.0, "residual_rms": 3.0}


def test_what_one_side_lacks_counts_there_as_nothing():
    """An evaluation adds its loss to its rows' totals, and another version's checkpoint has other metrics."""
    old = Totals.from_state({"kl": [6.0, 2.0], "gone": [1.0, 1.0]}, torch.device("cpu"))
    assert (old + totals(entropy=[4.0, 1.0], kl=[0.0, 1.0])).means() == {"kl": 2.0, "gone": 1.0, "entropy": 4.0}
    assert (Totals() + old).state() == (old + Totals()).state() == old.state()


def test_what_has_no_weight_has_no_mean():
    assert totals(kl=[0.0, 0.0], entropy=[1.0, 4.0]).means() == {"entropy": 0.25}
    assert Totals.from_state({}, torch.device("cpu")).means() == {}


def micro_batch(is_finite: bool = True, aux_loss: float | None = None, left_out: str = "truncated") -> Totals:
    """At β = 0.5 a fresh row, a replayed one, a fresh one that is cut, and one of a pool.

    Their residuals are 2, −4, none and 1. log π_ref − log π is ln 2 and 0 on the first, ln 3 on the third's one action.
    """
    staleness = None if left_out == "repeated" else 0
    rows = [
        row(ref=(math.log(2) - 1, -1.0), staleness=0),
        row("replayed", age=3),
        row(ref=(math.log(3) - 1, NAN), mask=(True, False), left_out=left_out, staleness=staleness),
        row("ahead", steps=(2, 4), staleness=3),
    ]
    batch = replace(collate([one.trajectory for one in rows], pad_token_id=0), pad_fraction=0.25)
    scores = TrajectoryScores(
        log_probs=torch.full((4, 3), -1.0), soft_value=torch.ones(4), hidden=torch.zeros(4, 2),
        entropy=torch.tensor([[9.0, 1, 2], [9, 3, 4], [9, 5, NAN], [9, 6, 0]]),
        aux_loss=None if aux_loss is None else torch.tensor(aux_loss),
    )  # fmt: skip
    inputs = ValueInputs(
        policy_value=torch.ones(4), ref_value=torch.ones(4), hidden=torch.zeros(4, 2),
        log_ratio=torch.tensor([0.5, 1.0, NAN, 2.0]), reward=torch.ones(4), value=torch.ones(4),
        group=torch.zeros(4, dtype=torch.long), counted=torch.tensor([True, True, False, True]), beta=0.5,
    )  # fmt: skip
    residual, soft_value = torch.tensor([2.0, -4.0, NAN, 1.0]), torch.tensor([1.0, 2.0, NAN, 6.0])
    return microbatch_totals(rows, batch, scores, inputs, soft_value, residual, torch.tensor(is_finite))


BY_HAND = {
    "residual/mean": 0.5 * (2 - 4 + 1) / 3, "soft_value": 0.5 * 9 / 3, "log_ratio": 0.5 * 3.5 / 3,
    "residual/rms": math.sqrt((1 + 4 + 0.25) / 3), "residual/fresh_rms": 1.0, "residual/replayed_rms": 2.0,
    "residual/ahead_rms": 0.5, "kl": (1 - math.log(2) + 0 + 2 - math.log(3)) / 3, "entropy": 21 / 7,
    "left_out/truncated": 0.25, "left_out/unscored": 0.0, "left_out/no_action": 0.0, "left_out/no_value": 0.0,
    "replay/age": 3.0, "staleness/mean": 1.0, "staleness/mixed": 1 / 3, "pad_fraction": 0.25,
}  # fmt: skip


def test_a_micro_batch_by_hand():
    """Sequences in reward units over rows that count, KL over actions of fresh rows, entropy over all actions."""
    assert micro_batch().means() == pytest.approx(BY_HAND, abs=1e-6)
    both = micro_batch(aux_loss=0.5) + micro_batch(aux_loss=0.75)
    assert both.means() == pytest.approx(BY_HAND | {"aux_loss": 0.625}, abs=1e-6)
    again = Totals.from_state(json.loads(json.dumps(both.state())), torch.device("cpu"))
    assert again.names == both.names and torch.equal(again.pairs, both.pairs)


def test_rows_that_fill_up_a_batch_count_nowhere():
    """The third row of the micro-batch by hand: KL and entropy lose its one action, and it is no share of the rows."""
    expected = BY_HAND | {
        "kl": (1 - math.log(2) + 0) / 2, "entropy": 16 / 6, "left_out/truncated": 0.0, "staleness/mean": 1.5,
        "staleness/mixed": 0.5,
    }  # fmt: skip
    assert micro_batch(left_out="repeated").means() == pytest.approx(expected, abs=1e-6)


def test_one_micro_batch_that_is_not_finite_spoils_the_update():
    sound, spoilt = micro_batch(), micro_batch(is_finite=False)
    assert (sound + sound).all_finite() and not (sound + spoilt).all_finite() and not (spoilt + spoilt).all_finite()


def test_the_loss_of_an_evaluation():
    """Losses 1, 3 and one that does not count, the second with weight 2: 7 over 2 rows."""
    names = ("policy_value", "ref_value", "hidden", "log_ratio", "reward", "value", "group")
    inputs = ValueInputs(**dict.fromkeys(names, torch.zeros(3)), counted=torch.tensor([True, True, False]), beta=0.5)
    loss = torch.tensor([1.0, 3.0, NAN], requires_grad=True)
    output = LossOutput(loss, loss, loss, inputs, TrajectoryScores(log_probs=loss), None)
    assert evaluation_loss(output, torch.tensor([1.0, 2.0, 5.0])).means() == {"loss": 3.5}


def test_an_evaluation_by_hand():
    """Two prompts with two rows each and a prompt that only fills up the batch. No function scored one of the rows."""
    numbers = torch.tensor([[0, 3, 0, 1, 2], [0, 5, 1, 3, NAN], [0, 4, 1, NAN, NAN], [0, 8, 0, 2, 2], [1, 9, 0, 7, 7],
                            [1, 9, 1, 7, 7]])  # fmt: skip
    metrics = evaluation_metrics(numbers, ["f", "g"], torch.tensor([1.0, 0.5]), 2)
    assert metrics == pytest.approx(
        {
            "reward": (2 + 3 + 3) / 3, "reward_std": math.sqrt(1 / 3), "frac_reward_zero_std": 0.0,
            "rewards/f/mean": 2.0, "rewards/f/std": 1.0, "rewards/g/mean": 2.0, "rewards/g/std": 0.0,
            "completions/mean_length": 5.0, "completions/min_length": 3.0, "completions/max_length": 8.0,
            "completions/mean_terminated_length": 5.5, "completions/min_terminated_length": 3.0,
            "completions/max_terminated_length": 8.0, "completions/clipped_ratio": 0.5,
        }
    )  # fmt: skip
    cut = evaluation_metrics(torch.tensor([[0, 1, 0, 2], [0, 1, 0, 2], [0, 1, 0, 5]]), ["f"], torch.ones(1), 2)
    assert (cut["reward"], cut["frac_reward_zero_std"]) == (3.0, 1.0)  # a stream that ends within a group
    alone = evaluation_metrics(torch.tensor([[0, 1, 1, 2], [0, 2, 1, 4]]), ["f"], torch.tensor([0.5]), 1)
    assert (alone["reward"], alone["rewards/f/mean"], alone["frac_reward_zero_std"]) == (1.5, 3.0, 1.0)
    assert alone["completions/clipped_ratio"] == 1 and alone["completions/mean_terminated_length"] == 0


def test_the_numbers_of_an_evaluations_rows():
    """For each row: whether it only fills up, the number of chosen tokens, whether it was cut, and its rewards."""
    rows = [row(left_out="repeated"), row(mask=(True, False), left_out="truncated")]
    rows[0].trajectory.rewards, rows[1].trajectory.end = {"f": 0.5, "g": 2.0}, End.LENGTH
    numbers = evaluated_numbers(rows, ["g", "f"])
    assert numbers[0].tolist() == [1, 2, 0, 2.0, 0.5] and numbers[1, :3].tolist() == [0, 1, 1]
    assert numbers[1, 3:].isnan().all()


def column(of: CompletionsTable) -> list[float | None]:
    values = [cells["advantage"] for generation in of.generations for cells in generation]
    return [None if math.isnan(value) else value for value in values]


def set_advantages(table: CompletionsTable, rows: list[UpdateRow], values: list[float], mode: str) -> None:
    table.set(rows, values, [0.0] * len(rows), mode)


def test_the_column_of_advantages():
    """A table of four rows, from generations of two. It keeps the rows that it shows, with values of trained ones."""
    table, rows = CompletionsTable(4), [row() for _ in range(6)]
    for generation in (rows[:2], rows[2:4]):
        table.add([one.trajectory for one in generation], "train")
    assert column(table) == [None] * 4
    rows[2].left_out = "unscored"
    set_advantages(table, rows[:4], [1.0, 2.0, 3.0, 4.0], "train")
    assert column(table) == [None, None, None, 4.0]  # the first two are of an earlier window
    table.add([rows[4].trajectory], "eval")
    set_advantages(table, rows[3:5], [7.0, 5.0], "eval")
    assert column(table) == [None, None, None, 4.0, 5.0]  # the last four and the rest of the generation of their first
    table.add([rows[5].trajectory], "eval")
    set_advantages(table, rows[2:4], [8.0, 9.0], "train")
    assert column(table) == [None, 9.0, 5.0, None]


def test_the_column_goes_on_after_a_resume():
    """After a resume the window's rows are recognized, but not those of an evaluation or of another window."""
    rows, other = [row() for _ in range(3)], row()
    table = CompletionsTable(3)
    table.add([one.trajectory for one in rows], "train")
    set_advantages(table, rows[:1], [1.0], "train")
    window = [other.trajectory, *(one.trajectory for one in rows)]
    state = json.loads(json.dumps(table.state(window)))
    again, later = CompletionsTable(3), [row() for _ in range(4)]
    again.restore(state, [one.trajectory for one in later])
    set_advantages(again, later, [9.0, 1.0, 2.0, 3.0], "train")
    assert column(again) == [1.0, 2.0, 3.0]
    table.add([row().trajectory for _ in range(3)], "eval")  # the window's rows leave the table
    again.restore(json.loads(json.dumps(table.state(window))), [one.trajectory for one in later])
    set_advantages(again, later, [9.0, 1.0, 2.0, 3.0], "train")
    assert column(again) == [None, None, None]


def test_a_recorder_counts_what_was_taken_since_the_last_log():
    """It adds up micro-batches until their step ends, and processes. A step that is not kept is in no mean."""
    doubled = SimpleNamespace(sync_gradients=False, reduce=lambda pairs, reduction: 2 * pairs)
    recorder = Recorder()
    assert recorder.means("train") == recorder.means("eval") == {}
    assert recorder.record(totals(kl=[6.0, 2.0]), doubled) is None
    doubled.sync_gradients = True
    step = recorder.record(totals(kl=[0.0, 1.0]), doubled)
    assert step.state() == {"kl": [12.0, 6.0]} and recorder.means("train") == {}
    skipped = recorder.record(totals(kl=[100.0, 1.0]), doubled)
    assert skipped.state() == {"kl": [200.0, 2.0]}
    recorder.keep(step, "train")
    recorder.keep(totals(kl=[5.0, 1.0]), "eval")
    assert recorder.means("eval") == {"kl": 5.0} and recorder.means("train") == {"kl": 2.0}
    assert recorder.means("train") == recorder.means("eval") == {}
    recorder.keep(step, "train")
    recorder.clear(totals(kl=[9.0, 3.0]))
    assert recorder.means("train") == {"kl": 3.0}
    recorder.keep(step, "train")
    recorder.clear()
    assert recorder.means("train") == {}
