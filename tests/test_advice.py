"""Messages before the first step and after the first window."""

from __future__ import annotations

import math
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from common.tiny import save
from datasets import Dataset
from helpers.forked import launch
from helpers.resume import build as build_resumable
from helpers.runs import build, config
from helpers.scripted import script, scripted_trainer

from tbrm_trl import trainer as trainer_module
from tbrm_trl.checks.advice import startup_line
from tbrm_trl.checks.data import check_dataset
from tbrm_trl.checks.first_window import BETA_BY_LENGTH, RATE_BY_SIZE, FirstWindow, Seen, advice, power_law
from tbrm_trl.run_log import read_lines
from tbrm_trl.sources.sampler import WindowSampler

# ---- the first line --------------------------------------------------------------------------------------------------


def test_startup_line():
    """70 prompts in generations of 16 × 2 = 32 trajectories: 4 generations an epoch, 2 × 2 updates each, 6 left."""
    args = config(
        per_device_train_batch_size=4, gradient_accumulation_steps=4, steps_per_generation=8, num_generations=2,
        num_iterations=2, num_train_epochs=3,
    )  # fmt: skip
    prompts = Dataset.from_list([{"prompt": str(i)} for i in range(70)])
    logged, mix = check_dataset(prompts, args, args.window_group_size)
    sampler = WindowSampler(logged, mix, args.num_generations, 1, 4, epoch=lambda: 0, seed=None)
    line = startup_line(mix, args, sampler)
    assert "16 prompts × 2 rollouts = 32 trajectories, for 4 update(s) on 16 each" in line
    assert "(4 per device × 1 process(es) × 4 accumulation)" in line
    assert "70 prompts give 16 updates per epoch, dropping 6 tail prompts; 48 updates in all" in line
    assert "\n" not in line


def test_it_is_printed(tmp_path, capsys):
    scripted_trainer(save(tmp_path / "model"), script(), tmp_path)
    assert "TBRM: each generation takes 8 prompts × 1 rollouts = 8 trajectories" in capsys.readouterr().out


# ---- the rules -------------------------------------------------------------------------------------------------------


def window(
    rewards: list[float], soft_value=0.0, size=None, updates=100, each=1, cut: range = range(0), **fields: Any
) -> FirstWindow:
    """A window of rollouts of 600 tokens, `each` per prompt, with those in `cut` cut."""
    given = dict(baseline=0.0, value=math.nan, length=600, drawn=True, counted=True) | fields
    return FirstWindow(
        [Seen(prompt=str(i // each), reward=reward, cut=i in cut, **given) for i, reward in enumerate(rewards)],
        soft_value,
        size,
        updates,
    )


SOUND = dict(beta=0.02, soft_value="calibrated", per_device_train_batch_size=8, max_completion_length=1000)
HALF = [0.0, 1.0] * 4


def test_power_laws():
    """At a published point; half-way on a log-log line, √(600·5000) ↦ √(0.02·0.002); beyond an end, the end's value."""
    assert power_law(BETA_BY_LENGTH, 600) == pytest.approx(0.02)
    assert power_law(BETA_BY_LENGTH, 3_000_000**0.5) == pytest.approx(0.00004**0.5)
    assert power_law(BETA_BY_LENGTH, 10) == pytest.approx(0.02)
    assert power_law(RATE_BY_SIZE, (1.345e8 * 1.54e9) ** 0.5) == pytest.approx((2e-5 * 2.5e-6) ** 0.5)
    assert power_law(RATE_BY_SIZE, 1e11) == pytest.approx(2e-6)


@pytest.mark.parametrize(
    ("seen", "options"),
    [
        (window(HALF), {}),
        (window(HALF, size=134_515_008), {"learning_rate": 2e-5}),  # the demo
        (window([0.0] * 7 + [1.0], size=1_543_714_304, length=2000), {"beta": 0.002, "learning_rate": 2.5e-6}),
        (window(HALF, soft_value=0.02 * 20, length=5000), {"beta": 0.002, "soft_value": "calibrated"}),
        (window(HALF, soft_value=0.002 * 30, length=5000), {"beta": 0.002, "soft_value": "policy"}),  # 30 of 500 nats
        (window([0.0, 100.0] * 4), {"beta": 2.0}),  # the target depends on R/β alone
        (window([-1.0, 1.0] * 4), {}),  # the mean is 0
        (window(HALF, value=0.0), {"soft_value": "optimal"}),  # on fresh rollouts V is a baseline
        (window([], counted=False), {}),
        (window(HALF, size=20_000), {"learning_rate": 1e-3}),  # nothing is known of models so small
    ],
)
def test_nothing_is_said_where_nothing_is_off(seen, options):
    assert advice(seen, config(**SOUND | options)) == []


@pytest.mark.parametrize(
    ("seen", "options", "said"),
    [
        (
            window([0.0] * 8),
            {},
            "Consider other prompts or another reward, because all 8 rewards are 0: nothing says which completion is "
            "better.",
        ),
        (  # 0.98^8 = 0.851; log 0.1 / log 0.98 = 113.97
            window([0.0] * 49 + [1.0]),
            {},
            "Consider updates of 114 trajectories or other prompts, because 2.0% of the rewards differ from 0: an "
            "update of 8 has none of these with probability 0.85, one of 114 with 0.1, and then nothing says which "
            "completion is better.",
        ),
        (
            window([0.0] * 6 + HALF[:2], each=2),
            {"soft_value": "group", "num_generations": 2},
            'Consider num_generations above 2 or soft_value="calibrated", because in 75% of the groups all rewards are '
            "equal: such a group teaches nothing while the policy is the reference.",
        ),
        (
            window([0.0] * 6 + HALF[:2], each=2),
            {"reward_baseline": "group_mean", "num_generations": 2},
            'Consider num_generations above 2 or reward_baseline="none", because in 75% of the groups all rewards are '
            "equal: such a group teaches nothing while the policy is the reference.",
        ),
        (
            window(HALF),
            {"beta": 0.002},
            "Consider beta=0.02, because completions have 600 tokens and rewards span 1. For a span of 1, 0.02 near "
            "600 tokens and 0.002 near 5,000 were published: beta=0.002 is 0.1 times what follows, and too small a "
            "beta collapses in the end.",
        ),
        (
            window([0.0, 0.1] * 4, length=5000),
            {"beta": 0.02},
            "Consider beta=0.0002, because completions have 5000 tokens and rewards span 0.1. For a span of 1, 0.02 "
            "near 600 tokens and 0.002 near 5,000 were published: beta=0.02 is 1e+02 times what follows, and too "
            "large a beta is stiff.",
        ),
        (
            window(HALF, size=134_515_008),
            {"learning_rate": 1e-6},
            "Consider learning_rate=2e-05, because 135 million parameters are trained. What trained well was 2e-5 for "
            "135 million, 2.5e-6 for 1,500 million and 2e-6 for 7,600 million: learning_rate=1e-06 is 0.05 times what "
            "follows.",
        ),
        (  # 30 nats against 1/0.02
            window(HALF, soft_value=0.6),
            {"soft_value": "policy"},
            'Consider soft_value="calibrated", or beta below 0.0033, because V(s_1) is 30.0 nats on average, not small '
            "against the 50.0 nats that R/beta spans: the first updates move the policy, whatever it earns.",
        ),
        (  # mean 0.5, error √(2/7 · …): std of 0/1 halves is 0.5345 over √8 = 0.189; 0.5 − 2 · 0.189 > 0.02
            window(HALF, value=0.0),
            {"soft_value": "optimal", "num_iterations": 2},
            'Consider soft_value="calibrated" or soft_value_offset=True, because beta V is a constant, 0 on average, '
            "and the right one is not below the mean reward, 0.5: 25 nats are missing, and they move the target on "
            "data that the policy did not just draw.",
        ),
        (  # mean −0.75, deviation √(1 − 0.75²) = 0.66
            window([-1.0] * 7 + [1.0]),
            {},
            "Consider adding 1 to every reward, because they are -0.75 on average, with a standard deviation of 0.66, "
            "and beta V is 0: the residual is mostly what all completions share, and its gradient is noise.",
        ),
        (  # what all share, 100, is more than what they differ by
            window([100.0] * 4 + [101.0] * 4),
            {},
            "Consider subtracting 100 from every reward, because the lowest is 100, they span 1, and beta V is 0: the "
            "residual is mostly what all completions share, and its gradient is noise.",
        ),
        (  # 0.5 at 0.001 an update are 500 of 100; a quarter of 100 updates are 25, and 0.5 / 25 = 0.02
            window(HALF),
            {"soft_value_offset": True, "soft_value_learning_rate": 0.001},
            "Consider soft_value_learning_rate=0.02, because beta V is 0.5 away from the mean reward and moves by "
            "0.001 an update at most: that takes 500 of the run's 100 updates.",
        ),
        (  # a head moves by twice its rate
            window(HALF),
            {"soft_value": "learned", "soft_value_learning_rate": 0.001},
            "Consider soft_value_learning_rate=0.01, because beta V is 0.5 away from the mean reward and moves by "
            "0.002 an update at most: that takes 250 of the run's 100 updates.",
        ),
        (  # the residual takes R − b: 0.5 − 0.25 at 0.001 an update are 250 of 100, and 0.25 / 25 = 0.01
            window(HALF, baseline=0.25),
            {"soft_value_offset": True, "soft_value_learning_rate": 0.001},
            "Consider soft_value_learning_rate=0.01, because beta V is 0.25 away from the mean reward less its "
            "baseline and moves by 0.001 an update at most: that takes 250 of the run's 100 updates.",
        ),
        (
            window([0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0], cut=range(5)),
            {},
            "Consider max_completion_length above 1000, because 62% of the completions are cut there, and none of "
            "these earns more than 0.",
        ),
        (
            window(HALF, cut=range(1, 8)),
            {"truncation": "bootstrap"},
            "Consider max_completion_length above 1000, because 88% of the completions are cut there, and only "
            "complete ones anchor V.",
        ),
    ],
)  # fmt: skip
def test_what_is_off_is_said_with_its_reason(seen, options, said):
    assert advice(seen, config(**SOUND | options)) == [said]


@pytest.mark.parametrize(
    ("seen", "options"),
    [
        (window(HALF, length=8), {"length_normalized": True, "beta": 0.5}),  # reward per nat and token
        (window([-1.0] * 7 + [1.0]), {"reward_baseline": "batch_mean"}),
        (window([100.0] * 4 + [101.0] * 4), {"reward_baseline": "batch_mean"}),
        (window([1.0] * 4 + [2.0] * 4), {}),  # they differ by as much as they share
        (window(HALF, value=0.45), {"soft_value": "optimal", "num_iterations": 2}),  # within two standard errors
        (
            window(HALF, value=0.0, updates=1000),
            {"soft_value": "optimal", "num_iterations": 2, "soft_value_offset": True},
        ),
        (window(HALF), {"soft_value": "zero", "num_iterations": 2}),  # who chooses it means it
        (window(HALF, size=134_515_008), {"learning_rate": 1e-3, "optim": "sgd"}),
        (window(HALF, cut=range(8)), {}),  # cut completions may be right
        (window([1.0]), {}),  # one trajectory differs from no other
        (window([0.0] * 4 + [1.0] * 4, cut=range(4)), {}),  # no more than half
        (window([0.0] * 6 + [1.0] * 2, cut=range(6), drawn=False), {}),  # a log: no option of this run cut it
        (  # the mean of R − b is 0, where β V is
            window(HALF, baseline=0.5),
            {"soft_value_offset": True, "soft_value_learning_rate": 0.001},
        ),
    ],
)
def test_a_rule_knows_where_it_ends(seen, options):
    assert advice(seen, config(**SOUND | options)) == []


def test_a_mean_that_is_positive_calls_for_no_shift():
    """It is 0.075, with a deviation of √(0.01 − 0.075²) = 0.066, and β V is 0.525 above it.

    With −0.1 seven times the mean is −0.075, and the same β V is 0.675 above that.
    """
    args = config(**SOUND | {"soft_value": "policy"})
    assert not any("adding" in said for said in advice(window([-0.1] + [0.1] * 7, soft_value=0.6), args))
    (said,) = [said for said in advice(window([-0.1] * 7 + [0.1], soft_value=0.6), args) if "adding" in said]
    assert said.startswith("Consider adding 0.1 to every reward, because they are -0.075 on average")


def test_equal_rewards_say_nothing_of_beta():
    (said,) = advice(window([0.0] * 8), config(**SOUND | {"beta": 0.5}))
    assert "all 8 rewards are 0" in said


# ---- in a run --------------------------------------------------------------------------------------------------------


def said_by(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("- Consider")]


def test_it_is_said_once_and_kept(llama, tmp_path, capsys):
    """8 tokens call for β = 0.02 (0.5 is 25 times that). 4 nats of V are more than a tenth of what rewards span."""
    trainer = build(llama, tmp_path, beta=0.5, max_steps=3, per_device_train_batch_size=8)
    trainer.train()
    said = said_by(capsys.readouterr().out)
    log = read_lines(Path(trainer.args.output_dir) / "log.jsonl")
    assert [f"- {sentence}" for sentence in log[0]["advice"]] == said
    assert any("beta=0.5 is" in one for one in said) and any('soft_value="calibrated"' in one for one in said)
    assert log[0]["step"] == 1 and "residual/rms" in log[0]  # beside the metrics of the first update
    assert not any("advice" in line for line in log[1:])


def test_it_is_not_said_again_on_resume(qwen2, tmp_path, capsys):
    trainer = build_resumable("fresh", qwen2, tmp_path, max_steps=3, beta=0.5)
    trainer.train()
    assert said_by(capsys.readouterr().out)
    resumed = build_resumable("fresh", qwen2, tmp_path, max_steps=4, beta=0.5)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert not said_by(capsys.readouterr().out)
    assert [line["step"] for line in read_lines(tmp_path / "log.jsonl") if "advice" in line] == [1]


def test_it_waits_for_an_update_that_counts(tmp_path, capsys):
    """No row of the first generation can be scored. The advice comes from the second, which has 8 trajectories."""
    rows = script(rows=16, unscored=tuple(range(8)))
    scripted_trainer(save(tmp_path / "model"), rows, tmp_path, per_device_train_batch_size=8, max_steps=2).train()
    (line,) = [line for line in read_lines(tmp_path / "log.jsonl") if "advice" in line]
    assert line["step"] == 2 and "nats on average" in " ".join(line["advice"])
    assert len(said_by(capsys.readouterr().out)) == len(line["advice"])


def advised(folder: str, out: str, rows: int) -> dict[str, Any]:
    """A short run: how many trajectories advice looks at each time, how often it is printed, and what the log holds."""
    looked_at: list[int] = []
    trainer_module.advice = lambda window, args: looked_at.append(len(window.rows)) or advice(window, args)
    trainer = build(folder, Path(out), beta=0.5, max_steps=2, per_device_train_batch_size=rows)
    with redirect_stdout(StringIO()) as printed:
        trainer.train()
    lines = read_lines(Path(out) / "out" / "log.jsonl") if trainer.is_world_process_zero() else []
    said = printed.getvalue().count("TBRM, after the first window:")
    return {"looked at": looked_at, "said": said, "advice": [line.get("advice") for line in lines]}


@pytest.mark.launch
def test_two_processes_look_at_one_window_and_one_of_them_speaks(llama, tmp_path):
    """Two windows of 8, four rows on each process. Both processes look at all 8 rows of the first window."""
    first, second = launch("test_advice:advised", folder=llama, out=tmp_path, rows=4)
    assert first["looked at"] == second["looked at"] == [8]
    assert (first["said"], second["said"]) == (1, 0)
    assert first["advice"][0] and not first["advice"][1]
