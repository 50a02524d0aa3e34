"""The loss of each trajectory by hand, from scores written in the test: no model runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tbrm_trl import TBRMConfig
from tbrm_trl.batch import Batch, TrajectoryScores, collate
from tbrm_trl.loss.soft_value import SoftValue
from tbrm_trl.loss.trajectory_loss import TrajectoryLoss
from tbrm_trl.trajectory import End, Trajectory, UpdateRow

BETA = 0.5


def loss_of(soft_value: str = "policy", **options) -> TrajectoryLoss:
    options = dict(per_device_train_batch_size=2) | options
    args = TBRMConfig("unused", use_cpu=True, bf16=False, beta=BETA, soft_value=soft_value, **options)
    return TrajectoryLoss(args, SoftValue.registry[soft_value](args))


def row(reward: float, ref: tuple[float, float], end: End = End.EOS, group: int = 0, **given: Any) -> UpdateRow:
    """Two actions after a prompt of one token."""
    given = dict(loss_mask=torch.tensor([True, True]), ref_log_probs=torch.tensor(ref)) | given
    return UpdateRow(
        Trajectory(torch.tensor([5]), torch.tensor([6, 7]), reward=reward, end=end, **given), "fresh", group=group
    )


def two() -> list[UpdateRow]:
    """Rewards 1 and 0.2; the second was cut. With `scores`, the log-ratios are 1 and −2."""
    return [row(1.0, (-1.5, -2.5), ref_soft_value=0.5, ref_end_value=9.0),
            row(0.2, (-1.0, -1.0), End.LENGTH, ref_soft_value=0.25, ref_end_value=0.125)]  # fmt: skip


def scores(batch: Batch, **wanted: Any) -> TrajectoryScores:
    """V(s_1) is 2 and 1, V after the last token 8 and 0.75; V(s_2) is 3 and 4."""
    return TrajectoryScores(
        log_probs=torch.tensor([[0.0, -1.0, -2.0], [0.0, -3.0, -1.0]], requires_grad=True)[
            :, : batch.input_ids.shape[1]
        ],
        soft_value=torch.tensor([2.0, 1.0], requires_grad=True),
        hidden=torch.zeros(2, 4),
        end_value=torch.tensor([8.0, 0.75]),
        state_values=torch.tensor([[0.0, 2.0, 3.0], [0.0, 1.0, 4.0]]) if wanted.get("every_value") else None,
        entropy=torch.tensor([[0.0, 0.5, 1.0], [0.0, 1.0, 1.0]]),
        aux_loss=torch.tensor(3.0) if wanted.get("router_logits") else None,
    )


def values(loss: TrajectoryLoss, rows: list[UpdateRow]) -> tuple[list[float], list[float]]:
    """The losses of two rows, and their residuals."""
    assert loss.mark_left_out(rows) == sum(one.left_out is None for one in rows)
    output = loss(rows, collate([one.trajectory for one in rows], pad_token_id=0), scores)
    assert output.aux_loss is None
    return output.loss.tolist(), output.residual.tolist()


@pytest.mark.parametrize(("soft_value", "options", "losses", "residuals"), [
    # δ = V + log-ratio − R/β: 2 + 1 − 2, and 1 − 2 − 0.4. The loss is (β δ)².
    ("policy", {}, (0.25, 0.49), (1, -1.4)),
    ("policy", dict(loss_units="logits"), (1, 1.96), (1, -1.4)),
    ("calibrated", {}, (0.0625, 0.680625), (0.5, -1.65)),  # V less 0.5 and 0.25
    ("zero", {}, (0.25, 1.44), (-1, -2.4)),
    # −log π is 3 where the reward reaches 1; in logits all is divided by β².
    ("policy", dict(sft_coef=0.1), (0.55, 0.49), (1, -1.4)),
    ("policy", dict(sft_coef=0.1, sft_threshold=1.01), (0.25, 0.49), (1, -1.4)),
    ("policy", dict(sft_coef=0.1, loss_units="logits"), (2.2, 1.96), (1, -1.4)),
    # A = −β δ is −0.5 and 0.7, entropies sum to 1.5 and 2; the term is taken off.
    ("policy", dict(entropy_advantage_coef=0.2), (0.4, 0.21), (1, -1.4)),
    # The cut row has earned 0.1, and V = 0.75 stands after it: 1 − 0.75 − 2 − 0.2. Calibrated the same: 0.75 − 0.625.
    ("policy", dict(truncation="bootstrap", truncated_reward=0.1), (0.25, 0.950625), (1, -1.95)),
    ("calibrated", dict(truncation="bootstrap", truncated_reward=0.1), (0.0625, 1.07640625), (0.5, -2.075)),
    # Tokens: 0.5 + 2 − 3 and 0.5 + 3 − 2; −2 + 1 − 4 and 0 + 4 − 0.4.
    ("policy", dict(residual="token"), (0.25 * 2.5, 0.25 * 37.96), (1, -1.4)),
])  # fmt: skip
def test_by_hand(soft_value, options, losses, residuals):
    found = values(loss_of(soft_value, **options), two())
    assert found[0] == pytest.approx(losses, rel=1e-6) and found[1] == pytest.approx(residuals, rel=1e-6)


def test_a_baseline_is_taken_off_the_reward():
    """It is not taken off where the reward is compared with `sft_threshold`."""
    rows = two()
    rows[0].trajectory.baseline = 0.5  # δ is 2 + 1 − 1
    assert values(loss_of(reward_baseline="batch_mean", sft_coef=0.1), rows)[0] == pytest.approx([1.3, 0.49])


def test_who_does_not_count():
    idle = row(1.0, (0.0, 0.0), loss_mask=torch.tensor([False, False]))
    rows = [*two(), row(math.nan, (0.0, 0.0)), idle]
    assert loss_of(truncation="mask").mark_left_out(rows) == 1
    assert [one.left_out for one in rows] == [None, "truncated", "unscored", "no_action"]
    assert loss_of().mark_left_out(rows) == 2
    for given in (dict(), dict(value=math.nan), dict(value=1.0, baseline=math.nan)):
        missing = [row(1.0, (0.0, 0.0), **given), row(1.0, (0.0, 0.0), value=2.0)]
        assert loss_of("log_mean_exp", num_generations=2).mark_left_out(missing) == 1
        assert [one.left_out for one in missing] == ["no_value", None]
    alone = [
        row(one, (0.0, 0.0), group=group) for one, group in ((1.0, 3), (0.0, 3), (1.0, 4), (math.nan, 4), (1.0, 5))
    ]
    assert loss_of("group", num_generations=2).mark_left_out(alone) == 2
    assert [one.left_out for one in alone] == [None, None, "no_value", "unscored", "no_value"]


def test_a_row_that_does_not_count_has_no_residual():
    rows = two()
    rows[1].trajectory.reward = math.nan
    for residual in ("trajectory", "token"):
        losses, residuals = values(loss_of(residual=residual), rows)
        assert residuals == [1, 0] and losses[1] == 0


def test_a_group_over_two_micro_batches():
    """Its mean of R/β − log-ratio, of 2 − 1 and 0.4 + 2, is 1.7: residuals 0.7 and −0.7 in any split."""
    loss, rows = loss_of("group", num_generations=2), two()
    assert values(loss, rows)[1] == pytest.approx([0.7, -0.7])
    batches = [([one], collate([one.trajectory], 0)) for one in rows]

    def scored(batch: Batch, **_: Any) -> TrajectoryScores:
        place = next(i for i, (_, mine) in enumerate(batches) if mine is batch)
        return TrajectoryScores(**{name: one[place : place + 1] for name, one in scores(batch).items()})

    loss.value_beforehand(batches, scored)
    assert [one.value for one in rows] == pytest.approx([1.7, 1.7])
    outputs = [loss(mine, batch, scored) for mine, batch in batches]
    assert [one.residual.item() for one in outputs] == pytest.approx([0.7, -0.7])
    assert not outputs[0].soft_value.requires_grad


@pytest.mark.parametrize("selection", ["scatter", "cut"])
def test_in_part_by_hand(selection):
    """The loss is that of all tokens. The router's loss comes from the second forward."""
    loss, rows = loss_of("calibrated", token_fraction=0.5, token_selection=selection), two()
    loss.router_loss = True
    assert loss.mark_left_out(rows) == 2
    batch = collate([one.trajectory for one in rows], pad_token_id=0)
    output = loss(rows, batch, scores, in_part=True)
    assert output.loss.tolist() == pytest.approx([0.0625, 0.680625], rel=1e-6)
    assert output.residual.tolist() == pytest.approx([0.5, -1.65], rel=1e-6) and output.aux_loss == 3
    assert output.loss.requires_grad and not output.residual.requires_grad
    assert loss(rows, batch, scores).aux_loss == 3  # and from the only one
