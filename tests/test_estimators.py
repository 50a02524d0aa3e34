"""Estimators of the soft value by hand, from trajectories written in the test, without model and trainer."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from common.tiny import save_value_model
from datasets import Dataset, IterableDataset
from helpers.own_code import give_code
from helpers.runs import config
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tbrm_trl.loss.soft_value import SoftValue, ValueInputs
from tbrm_trl.loss.soft_value.log_mean_exp import log_mean_exp
from tbrm_trl.loss.soft_value.model import _until_first_action
from tbrm_trl.loss.soft_value.sampled import _random_state_of
from tbrm_trl.trajectory import End, Source, Trajectory

NAN = math.nan


def row(prompt: int, reward: float, source: Source = Source.ROLLOUT, **given) -> Trajectory:
    given = dict(loss_mask=torch.tensor([True])) | given
    return Trajectory(torch.tensor([prompt]), torch.tensor([9]), reward=reward, end=End.EOS, source=source, **given)


def of(name: str, **options):
    return SoftValue.registry[name](config(soft_value=name, **options))


def values(trajectories) -> list[float | None]:
    return [one.value for one in trajectories]


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_log_mean_exp_is_over_the_last_dimension():
    rewards = torch.tensor([[0.0, math.log(3)], [1.0, 1.0], [2.0, 4.0]], dtype=torch.float64)
    for temperature, last in ((1.0, 2 + math.log((1 + math.exp(2)) / 2)), (math.inf, 3.0)):
        found = log_mean_exp(rewards, temperature)
        first = math.log(2) if temperature == 1 else math.log(3) / 2
        assert found.tolist() == pytest.approx([first, 1.0, last], abs=1e-14)


@pytest.mark.parametrize("soft_value_beta", [None, 0.5])
def test_log_mean_exp_of_each_group(soft_value_beta):
    """For 0.1 twice it is 0.1 to the last digit. A row without a reward has its group's value, unless all lack one."""
    rewards = [0.1, 0.1, NAN, 0.3, NAN, NAN, 0.0, 1.0, 1.0]
    window = [row(place // 3, reward) for place, reward in enumerate(rewards)]
    of("log_mean_exp", num_generations=3, per_device_train_batch_size=3, beta=0.1, soft_value_beta=soft_value_beta)\
        .on_window(window, [{}] * 9, 3)  # fmt: skip
    beta = soft_value_beta or 0.1
    third = beta * math.log((1 + 2 * math.exp(1 / beta)) / 3)
    assert values(window) == [*[pytest.approx(0.1, rel=1e-14)] * 3, *[None] * 3, *[pytest.approx(third, rel=1e-14)] * 3]


def test_log_mean_exp_of_what_is_masked():
    """A cut trajectory that is masked is not counted, so the other one of its group is alone."""
    window = [row(0, 1.0), row(0, 0.0), row(1, 1.0), row(1, 0.0)]
    window[1].end = End.LENGTH
    estimator = of("log_mean_exp", num_generations=2, per_device_train_batch_size=2, beta=1.0, truncation="mask")
    estimator.on_window(window, [{}] * 4, 2)
    assert values(window) == [None, None, *[pytest.approx(math.log((math.e + 1) / 2), rel=1e-14)] * 2]


def test_a_groups_mean_leaves_out_what_does_not_count():
    """At β = 0.5, R/β − log-ratio is 1 and 4 in group 7, the third not counted; 6 in group 3."""
    inputs = ValueInputs(
        policy_value=torch.zeros(4), ref_value=torch.zeros(4), hidden=torch.zeros(4, 1),
        log_ratio=torch.tensor([1.0, -2.0, -2.0, 5.0]), reward=torch.tensor([1.0, 2.0, 1.0, NAN]),
        value=torch.zeros(4), group=torch.tensor([7, 3, 7, 7]), counted=torch.tensor([True, True, True, False]),
        beta=0.5,
    )  # fmt: skip
    value = of("group", num_generations=2, per_device_train_batch_size=2)(inputs)
    assert value.tolist() == [2.5, 6.0, 2.5, 2.5]


# ---- the prompt's history --------------------------------------------------------------------------------------------


def tracker(counts=lambda trajectory: True, **options):
    run = SimpleNamespace(evaluating=False, counts=counts)
    estimator = of("tracked", soft_value_half_life=0.06, **options)
    estimator.attach(run)
    return estimator, run


def after_window(estimator, *trajectories: Trajectory) -> list[float | None]:
    estimator.on_window(trajectories, [{}] * len(trajectories), 1)
    return values(trajectories)


def test_a_tracker_by_hand():
    """A window's rewards count from the next window on. From one window to the next, 0.96 of the counts is kept."""
    estimator, run = tracker(counts=lambda trajectory: trajectory.reward >= 0)
    assert after_window(estimator, row(1, 1.0), row(1, 0.0), row(2, 1.0), row(3, -1.0)) == [0.0] * 4
    log = row(1, 5.0, Source.LOGGED)
    # All: n = 0.96 + 3, s = 2. Prompts 1 and 2 begin with this mean, as one reward; 3 and 4 have it.
    mean = 2 / 3.96
    first, second = (0.96 * mean + 1) / 2.96, (0.96 * mean + 1) / 1.96
    found = after_window(estimator, row(1, 1.0), row(2, 0.0), row(3, 0.0), row(4, 0.5), log)
    assert found == pytest.approx([first, second, mean, mean, first])
    run.evaluating = True  # an evaluation counts nothing, not even the last window again
    state = json.dumps(estimator.state())
    assert after_window(estimator, row(1, 9.0), row(5, 9.0)) == pytest.approx([first, mean])
    assert json.dumps(estimator.state()) == state
    run.evaluating = False
    resumed, _ = tracker()
    resumed.restore(json.loads(state))
    for one in (estimator, resumed):
        third = after_window(one, row(1, 0.0), row(3, 0.0))
        mean_now = (0.96 * 2 + 1.5) / (0.96 * 3.96 + 4)
        own = (0.96 * (0.96 * mean + 1) + 1) / (0.96 * 2.96 + 1)
        assert third == pytest.approx([own, 0.96 * mean_now / 1.96])


@pytest.mark.parametrize(
    ("kl", "kept"), [(0.005, 2 ** (-1 / 12)), (0.5, 0.875), (0.0001, 0.96), (-1.0, 0.96), (None, 0.96)]
)
def test_a_tracker_forgets_as_the_policy_moves(kl, kept):
    """At a KL of 0.005 the distance is 0.1, and D = 0.1²/2 is a twelfth of the half-life. Kept: 0.875 to 0.96."""
    estimator, _ = tracker()
    after_window(estimator, row(1, 1.0))
    after_window(estimator, row(1, 0.0))
    number, total = 1.96, 0.96 / 1.96 + 1  # it began with the mean of all, 1/1.96
    estimator.after_update({} if kl is None else {"kl": kl, "entropy": 1.0}, [])
    number, total = kept * number + 1, kept * total
    assert after_window(estimator, row(1, 0.0)) == pytest.approx([total / number])
    # The same distance once more is no movement.
    assert after_window(estimator, row(1, 0.0)) == pytest.approx([0.96 * total / (0.96 * number + 1)])


def test_a_tracker_begins_anew_with_training():
    estimator, run = tracker()
    after_window(estimator, row(1, 1.0))
    estimator.after_update({"kl": 0.1}, [])
    estimator.prepare(run)
    assert estimator.state() == {"counts": {}, "earned": [], "distance": 0.0}


# ---- samples of the reference ----------------------------------------------------------------------------------------

PROMPTS = Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])
NONE_LOGGED = np.zeros(2, bool)


@pytest.mark.parametrize(
    ("samples", "group", "use"), [(0, 1, 1), (-2, 2, 2), (1, 2, 2), (3, 2, 4), (5, 4, 8), (0, 3, 3)]
)
def test_so_many_samples_cannot_be_drawn(samples, group, use):
    estimator = of("optimal", soft_value_samples=samples, num_generations=group, per_device_train_batch_size=group)
    with pytest.raises(ValueError, match=rf"must be a positive multiple of num_generations={group}.* Use {use}\."):
        estimator.check_data(PROMPTS, NONE_LOGGED)


def test_what_sampling_needs_of_the_data():
    for samples, group in ((1, 1), (2, 2), (4, 2)):
        estimator = of("optimal", soft_value_samples=samples, num_generations=group, per_device_train_batch_size=group)
        estimator.check_data(PROMPTS, NONE_LOGGED)
    estimator = of("optimal")
    with pytest.raises(ValueError, match="which a stream does not allow"):
        estimator.check_data(IterableDataset.from_generator(lambda: iter([])), NONE_LOGGED)
    with pytest.raises(ValueError, match="add a column `optimal_value`"):
        estimator.check_data(PROMPTS, np.array([False, True]))
    for given in (math.inf, 1e30):
        with pytest.raises(ValueError, match=r"Row 1 of the training set: `optimal_value` is .* must be finite"):
            estimator.check_data(PROMPTS.add_column("optimal_value", [0.5, given]), NONE_LOGGED)
    for given in ("0.5", [0.5]):
        with pytest.raises(ValueError, match=r"Row 0 of the training set: `optimal_value` is .* must be finite"):
            estimator.check_data(PROMPTS.add_column("optimal_value", [given, given]), NONE_LOGGED)
    estimator.check_data(PROMPTS.add_column("optimal_value", [0.5, -3.0]), np.ones(2, bool))
    for missing in (NAN, None):  # as a data set that was sampled here may have, once it is saved
        estimator.check_data(PROMPTS.add_column("optimal_value", [0.5, missing]), NONE_LOGGED)
        with pytest.raises(ValueError, match="`optimal_value` is empty in every row"):
            estimator.check_data(PROMPTS.add_column("optimal_value", [missing, missing]), NONE_LOGGED)
    estimator = of("quantile")
    for cell, message in (
        ([NAN], "finite"), ([0.0, None], "finite"), ([1e30], "at most"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"Row 1 .*{message}"):
            estimator.check_data(PROMPTS.add_column("reference_rewards", [[0.5], cell]), NONE_LOGGED)
    with pytest.raises(ValueError, match=r"Row 0 .*must be finite"):
        estimator.check_data(PROMPTS.add_column("reference_rewards", [["0.5"], ["1.0"]]), NONE_LOGGED)
    for sound in ([0.0, 1.0], [], None):
        estimator.check_data(PROMPTS.add_column("reference_rewards", [[0.5], sound]), NONE_LOGGED)
    logs = np.ones(2, bool)
    of("tracked", soft_value_tracks="value").check_data(PROMPTS, logs)
    with pytest.raises(ValueError, match=r"soft_value_half_life=0.5` has no effect: .* logged rows alone"):
        of("tracked", soft_value_tracks="value", soft_value_half_life=0.5).check_data(PROMPTS, logs)


def test_optimal_values_of_sampled_rewards():
    """β₁ is β unless it is given. A prompt without a scored sample has no value."""
    rewards = [torch.tensor([0.0, math.log(3)], dtype=torch.float64), torch.zeros(0), torch.tensor([0.25])]
    first, none, alone = of("optimal", soft_value_beta=1.0, beta=0.1).cells(rewards)
    assert (first, alone) == (pytest.approx(math.log(2)), 0.25) and math.isnan(none)
    at_beta = 0.1 * math.log((1 + math.exp(math.log(3) / 0.1)) / 2)
    assert of("optimal", beta=0.1).cells(rewards)[0] == pytest.approx(at_beta)


@pytest.mark.parametrize("name", ["optimal", "quantile"])
def test_prompts_of_an_evaluation_have_no_samples(name):
    """Those without samples leave the loss. Of the samples 0.25 and 0.75, half are below 0.5."""
    window = [row(1, 0.5), row(2, 0.5), row(3, 0.5)]
    given = [{"optimal_value": 0.75, "reference_rewards": [0.25, 0.75]}, {}, {"optimal_value": None}]
    of(name, beta=0.5).on_window(window, given, 1)
    log_z = math.log(0.5 * (math.exp(2) - 1))
    assert values(window) == [pytest.approx(0.75 if name == "optimal" else 0.5 * log_z), None, None]
    assert [one.baseline for one in window] == [0.0, 0.0, 0.0]  # q is 1/2


def test_unsolved_prompts_are_dropped():
    """A prompt is solved if one sample earns more than 0. Enough prompts for one window must be left."""
    rewards = torch.tensor([[0.0, 0.0], [0.0, 0.5], [-1.0, NAN], [1.0, NAN], [NAN, NAN]], dtype=torch.float64)
    data = Dataset.from_list([{"prompt": text} for text in "abcde"])
    said: list[str] = []
    run = SimpleNamespace(accelerator=SimpleNamespace(print=said.append))
    two = dict(num_generations=2, per_device_train_batch_size=2, soft_value_drop_unsolved=True)
    assert of("optimal", **two | {"soft_value_drop_unsolved": False}).kept(data, rewards, run) is data and not said
    assert of("optimal", **two, steps_per_generation=2).kept(data, rewards, run)["prompt"] == ["b", "d"]
    dropped = "TBRM: 3 of 5 prompts dropped: no reference sample was rewarded."
    assert said == [f"{dropped} 1 of these have no scored sample."]
    with pytest.raises(ValueError, match="leaves 2 of 5 prompts, fewer than the 3 of one generation window"):
        of("optimal", **two, steps_per_generation=3).kept(data, rewards, run)


def test_draws_of_a_block_depend_on_its_seed_alone():
    """Another block has other draws, and later draws are as if no block had been drawn."""
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    seeds, drawn = set(), []
    for block in (*range(300), 7):
        with _random_state_of(42, block):
            seeds.add(torch.initial_seed())
            drawn.append(torch.rand(()).item())
    assert len(seeds) == 300 and drawn[-1] == drawn[7] != drawn[8]
    assert torch.equal(torch.rand(2), expected)


class SamplingRun:
    """A run in which each sample earns a tenth of its prompt's number."""

    def __init__(self, **settings):
        self.train_dataset = Dataset.from_list([{"prompt": text, "number": i} for i, text in enumerate("abcde")])
        self.reference_key, self.rollout_settings = "key", {"rewards": "digest"} | settings
        self.asked: list[list[int]] = []
        self.seeds: list[int] = []

    @property
    def accelerator(self):
        return Accelerator(cpu=True)  # options that are made later reset its state

    def sample(self, rows):
        self.asked.append([one["number"] for one in rows])
        self.seeds.append(torch.initial_seed())
        return [row(one["number"], one["number"] / 10) for one in rows]

    def replace_prompts(self, dataset):
        self.train_dataset = dataset


def sampled(folder, run=None, **options) -> SamplingRun:
    """Two samples of each of five prompts, in blocks of two prompts unless options say otherwise."""
    run = run or SamplingRun()
    options = dict(soft_value_samples=2, per_device_train_batch_size=2, steps_per_generation=2) | options
    of("quantile", output_dir=str(folder), **options).prepare(run)
    return run


def test_the_reference_is_sampled_in_blocks(tmp_path, capsys):
    """The last block is filled up. Rewards are read back unchanged, and each block has draws of its own."""
    first = sampled(tmp_path)
    assert first.asked == [[0, 0, 1, 1], [2, 2, 3, 3], [4, 4, 4, 4]] and len(set(first.seeds)) == 3
    assert first.train_dataset["reference_rewards"] == [[i / 10] * 2 for i in range(5)]
    shown = capsys.readouterr()
    assert "read from" not in shown.out and "Sampling the reference: 100%" in shown.err
    [file] = (tmp_path / "optimal_values").glob("*.parquet")
    again = sampled(tmp_path)
    assert not again.asked and again.train_dataset["reference_rewards"] == first.train_dataset["reference_rewards"]
    assert f"rewards of the reference's samples read from {file}" in capsys.readouterr().out
    file.unlink()  # killed after the second block
    file.with_suffix("").joinpath("000000004-2.parquet").unlink()
    resumed = sampled(tmp_path, disable_tqdm=True)
    assert "Sampling" not in capsys.readouterr().err
    assert (resumed.asked, resumed.seeds) == (first.asked[2:], first.seeds[2:])
    assert resumed.train_dataset["reference_rewards"] == first.train_dataset["reference_rewards"]
    few = sampled(tmp_path / "few", soft_value_samples=8)  # never more at once than a window has
    assert few.asked == [[i] * 4 for i in range(5) for _ in range(2)]


def test_what_is_sampled_anew(tmp_path):
    """Samples are kept for runs that would draw the same, but not for another reference, reward or way to sample."""
    sampled(tmp_path)
    same = [dict(learning_rate=0.5), dict(beta=0.3), dict(reward_on_error="raise"), dict(num_generations=2)]
    for options in same:
        assert not sampled(tmp_path, **options).asked, options
    for options in (
        dict(soft_value_samples=4), dict(temperature=0.5), dict(max_completion_length=9), dict(reward_pessimism=0.5),
        dict(chat_template_kwargs={"thinking": True}),
        dict(long_prompts="cut", max_prompt_length=5), dict(long_prompts="cut", max_prompt_length=6),
        dict(reward_on_error="skip"), dict(reward_on_error=0.5),
    ):  # fmt: skip
        assert sampled(tmp_path, **options).asked, options
    assert sampled(tmp_path, SamplingRun(rewards="other")).asked
    another = SamplingRun()
    another.reference_key = "another"
    assert sampled(tmp_path, another).asked
    others = SamplingRun()
    others.train_dataset = others.train_dataset.select([4, 3, 2, 1, 0])
    assert sampled(tmp_path, others).asked
    brought = SamplingRun()
    brought.train_dataset = brought.train_dataset.add_column("reference_rewards", [[0.5]] * 5)
    assert not sampled(tmp_path / "brought", brought).asked


def test_samples_that_no_function_scored_are_left_out(tmp_path):
    run = SamplingRun()
    sample = run.sample
    run.sample = lambda rows: [row(0, NAN if i % 2 else one.reward) for i, one in enumerate(sample(rows))]
    assert sampled(tmp_path, run).train_dataset["reference_rewards"] == [[i / 10] for i in range(5)]


def test_what_was_unscored_is_sampled_again(tmp_path, capsys):
    """A reward function that was down for one block: only that block is sampled again, and only its gaps are filled."""
    run = SamplingRun()
    sample = run.sample
    run.sample = lambda rows: [row(0, NAN if one.reward >= 0.2 else one.reward) for one in sample(rows)]
    first = sampled(tmp_path, run)
    assert first.train_dataset["reference_rewards"] == [[0.0] * 2, [0.1] * 2, [], [], []]
    assert "6 of 10 samples of the reference are unscored. 3 of 5 prompts have no other" in capsys.readouterr().out
    brought = SamplingRun()
    brought.train_dataset = first.train_dataset  # saved, and given to another run
    of("quantile").check_data(brought.train_dataset, np.zeros(5, bool))
    assert not sampled(tmp_path / "brought", brought).asked
    assert "`reference_rewards` is empty in 3 of 5 rows" in capsys.readouterr().out
    resumed = sampled(tmp_path)  # as it began: which prompts it trains on may depend on them
    assert not resumed.asked and resumed.train_dataset["reference_rewards"] == first.train_dataset["reference_rewards"]
    [file] = (tmp_path / "optimal_values").glob("*.parquet")
    assert f"remove {file} and start a new run" in capsys.readouterr().out
    file.unlink()
    again = sampled(tmp_path)
    assert (again.asked, again.seeds) == (first.asked[1:], first.seeds[1:])
    assert again.train_dataset["reference_rewards"] == [[i / 10] * 2 for i in range(5)]
    assert not sampled(tmp_path).asked

    half = SamplingRun()
    sample_half = half.sample
    half.sample = lambda rows: [row(0, NAN if i % 2 else 7.0) for i, _ in enumerate(sample_half(rows))]
    sampled(tmp_path / "half", half)
    next((tmp_path / "half/optimal_values").glob("*.parquet")).unlink()
    assert sampled(tmp_path / "half").train_dataset["reference_rewards"] == [[7.0, i / 10] for i in range(5)]


# ---- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "tokens"), [([1, 0, 1], [4]), ([0, 0, 1], [4, 5, 6]), ([0, 1, 1], [4, 5]), ([0, 0, 0], [4])]
)
def test_a_value_model_reads_up_to_the_first_action(mask, tokens):
    trajectory = Trajectory(torch.tensor([4]), torch.tensor([5, 6, 7]), torch.tensor(mask).bool(), 0.0, End.EOS)
    assert _until_first_action(trajectory) == tokens


def test_a_value_model_scores_the_last_token_whatever_it_is(tmp_path):
    """Ids that are padding or an end for a tokenizer count as tokens here. The model is frozen."""
    folder = save_value_model(tmp_path / "value")
    estimator = of("model", soft_value_model=folder, per_device_train_batch_size=3)
    estimator.attach(
        SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(folder), accelerator=Accelerator(cpu=True))
    )
    states = [[5, 0], [5, 1], [5, 2], [6, 7], [5], [5, 1, 1], [5, 0]]
    window = [row(1, 0.0) for _ in states]
    for one, state in zip(window, states, strict=True):
        one.prompt_ids = torch.tensor(state)
    estimator.on_window(window, [{}] * len(states), 1)
    model = estimator.model
    with torch.no_grad():
        expected = [model.score(model.base_model(one.prompt_ids[None])[0][0, -1]).item() for one in window]
    assert values(window) == pytest.approx(expected, abs=1e-6) and len({round(one, 6) for one in expected}) == 6
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training


def test_a_value_model_in_half_precision_gives_values_in_float32(tmp_path):
    """V is its value over β: at β = 0.002, neighbours of bfloat16 near 0.7 are 2 nats apart."""
    folder = save_value_model(tmp_path / "value")
    AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    estimator = of("model", soft_value_model=folder)
    estimator.attach(
        SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(folder), accelerator=Accelerator(cpu=True))
    )
    assert {parameter.dtype for parameter in estimator.model.parameters()} == {torch.float32}


def test_a_value_model_has_one_label(tmp_path):
    folder = save_value_model(tmp_path / "value")
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, ignore_mismatched_sizes=True)\
        .save_pretrained(folder)  # fmt: skip
    with pytest.raises(ValueError, match="has 2 labels"):
        of("model", soft_value_model=folder).attach(SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(folder)))


def test_a_value_model_with_code_of_its_own(tmp_path):
    folder = give_code(save_value_model(tmp_path / "value"))
    run = SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=True))
    with pytest.raises(ValueError, match="trust_remote_code"):
        of("model", soft_value_model=folder).attach(run)
    estimator = of("model", soft_value_model=folder, trust_remote_code=True)
    run.accelerator = Accelerator(cpu=True)
    estimator.attach(run)
    assert type(estimator.model).__name__ == "Classifier"


def test_an_estimator_says_what_it_lacks():
    with pytest.raises(NotImplementedError):
        SoftValue(None)(None)
