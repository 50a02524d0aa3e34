"""The rows of a window and their order: prompts to roll out beside logged rows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers.forked import launch
from helpers.runs import build, config
from transformers import TrainerCallback

from tbrm_trl.resume import complete_checkpoints
from tbrm_trl.sources.sampler import Orders, WindowMix, WindowSampler, window_mix


def sampler(logged_mask, mix: WindowMix, generations=1, processes=1, repeats=1, epoch=0, seed=0) -> list[int]:
    return list(WindowSampler(np.array(logged_mask), mix, generations, processes, repeats, lambda: epoch, seed))


@pytest.mark.parametrize("sorted_rows", [True, False])
def test_every_process_rolls_out_the_same_number(sorted_rows):
    """n = 4, two processes, windows of 16 with half of them logged, also if all logged rows come first in the data."""
    mask = [True] * 40 + [False] * 10 if sorted_rows else [True, True, False, True, True] * 10
    indices = sampler(mask, WindowMix(8, 8), generations=4, processes=2)
    assert len(indices) == 5 * 16  # ten prompts, two per window
    for start in range(0, len(indices), 16):
        window = indices[start : start + 16]
        for share in (window[:8], window[8:]):
            assert [mask[i] for i in share] == [False] * 4 + [True] * 4
        counts = Counter(window)
        assert all(counts[i] == (1 if mask[i] else 4) for i in counts)
    prompts = Counter(i for i in indices if not mask[i])
    assert len(prompts) == 10 and set(prompts.values()) == {4}


def test_the_logged_stream_goes_on():
    """36 logged draws from 20 rows over epochs, in windows that do not divide them: all rows before any repeats."""
    mask = [False] * 6 + [True] * 20
    drawn = []
    for epoch in range(4):
        drawn += [i for i in sampler(mask, WindowMix(2, 3), epoch=epoch) if mask[i]]
    assert len(drawn) == 36 and len(set(drawn[:20])) == 20
    assert drawn[:18] != drawn[18:]


def test_a_pass_over_the_log_is_put_in_order_once(monkeypatch):
    """Its windows share the order. Otherwise a log of a million rows in groups costs seconds before each window."""
    made, grouped = [], WindowSampler._grouped
    rows = WindowSampler(
        np.ones(40, bool), WindowMix(0, 4), 1, 1, 1, lambda: 0, seed=3, group_size=2, prompt_numbers=np.arange(40) // 4
    )
    monkeypatch.setattr(WindowSampler, "_grouped", lambda self, rows: made.append(1) or grouped(self, rows))
    passes = [[row for window in range(first, first + 10) for row in rows.window(window)] for first in (0, 10)]
    assert len(made) == 2 and sorted(passes[0]) == sorted(passes[1]) == list(range(40)) and passes[0] != passes[1]
    assert all(a // 4 == b // 4 for one in passes for a, b in zip(one[::2], one[1::2], strict=True))


@pytest.mark.parametrize("seed", [None, 5])
def test_the_order_of_a_pass_does_not_depend_on_what_was_asked_before(seed, monkeypatch):
    """Forwards, a pass or two back as a pool and its run ask for them, and far back."""
    rows, shuffle = np.arange(10, 17), torch.randperm
    generator = torch.Generator().manual_seed(5)
    expected = [rows if seed is None else rows[shuffle(7, generator=generator).numpy()] for _ in range(60)]
    made = []
    monkeypatch.setattr(torch, "randperm", lambda *given, **options: made.append(1) or shuffle(*given, **options))
    orders = Orders(rows, seed)
    for number in (0, 0, *(one + step for one in range(40) for step in (2, 0, 1)), 59, 3, 58):
        assert np.array_equal(orders(number), expected[number])
    assert len(made) < 400  # not 60 · 61 / 2


def test_fresh_rows_in_trls_order():
    """Without logged rows the order is TRL's, epoch after epoch."""
    from trl.trainer.utils import RepeatSampler

    theirs = RepeatSampler(range(10), mini_repeat_count=2, batch_size=3, repeat_count=2, seed=7)
    for epoch in range(3):
        assert sampler([False] * 10, WindowMix(6, 0), generations=2, repeats=2, epoch=epoch, seed=7) == list(theirs)


@pytest.mark.parametrize(
    ("rows", "fraction", "result"),
    [
        ((30, 10), None, (12, 4)),  # the share of the data set
        ((10, 0), None, (16, 0)),
        ((0, 10), None, (0, 16)),
        ((30, 10), 0.5, (8, 8)),
        ((1000, 1), None, (15, 1)),  # never none of a kind
        ((30, 10), 0.3, "Nearest: 0.25 or 0.3125"),
        ((10, 0), 0.5, "has only prompts"),
        ((0, 10), 0.5, "has only logged"),
    ],
)
def test_window_composition(rows, fraction, result):
    args = config(per_device_train_batch_size=16, logged_fraction=fraction)
    if isinstance(result, str):
        with pytest.raises(ValueError, match=result):
            window_mix(*rows, args, args.window_group_size)
    else:
        assert window_mix(*rows, args, args.window_group_size) == WindowMix(*result)


@pytest.mark.parametrize("seed", [None, 7])
def test_rows_that_fill_no_group_take_turns(seed):
    """Of three rows a prompt, two are compared in a pass. In three passes each is drawn twice, shuffled or not."""
    numbers = np.array([0, 1, 0, 0, 1, 1, 2, 2])
    rows = WindowSampler(np.ones(8, bool), WindowMix(0, 2), 1, 1, 1, lambda: 0, seed, 2, numbers)
    assert rows.logged_per_pass == 6
    groups = [rows.window(number) for number in range(9)]
    assert all(numbers[a] == numbers[b] for a, b in groups)
    drawn = Counter(row for group in groups for row in group)
    assert drawn[6] == drawn[7] == 3
    if seed is None:
        assert groups[:3] == [[0, 2], [1, 4], [6, 7]] and [drawn[row] for row in range(6)] == [2] * 6


def test_rollouts_come_in_groups():
    args = config(per_device_train_batch_size=16, num_generations=4, logged_fraction=0.4)
    with pytest.raises(ValueError, match=r"multiples of 4.*Nearest: 0.25 or 0.5"):
        window_mix(10, 10, args, args.window_group_size)


def test_data_seed_orders_the_data(llama, tmp_path):
    """As in transformers: `data_seed` replaces `seed` where data are ordered, and there alone."""
    orders = [
        list(build(llama, tmp_path, **seeds)._get_train_sampler())
        for seeds in (dict(seed=3), dict(seed=4, data_seed=3), dict(seed=3, data_seed=4))
    ]
    assert orders[0] == orders[1] != orders[2]
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "a"}]))
    with pytest.raises(ValueError, match="`data_seed=3` has no effect on a stream, which TRL shuffles by `seed`"):
        build(llama, tmp_path, train_dataset=stream, max_steps=1, data_seed=3)


def rows_of_files(files: list[tuple[str, int]]):
    for name, rows in files:
        yield from ({"prompt": f"{name}{row}"} for row in range(rows))


def windows_of_files(folder: str, out: str) -> list[list[str]]:
    """The prompts that this process rolls out, by window, from a stream of two files. A pass is three windows."""
    stream = IterableDataset.from_generator(rows_of_files, gen_kwargs={"files": [("a", 18), ("b", 7)]})
    assert stream.num_shards == 2
    drawn: list[list[str]] = []

    def reward(prompts, completions, **kwargs):
        drawn.append(prompts)
        return [0.0] * len(prompts)

    build(
        folder, Path(out), reward, stream, shuffle_dataset=False, per_device_train_batch_size=2, num_generations=2,
        gradient_accumulation_steps=4, max_steps=6, save_strategy="epoch", max_completion_length=4,
    ).train()  # fmt: skip
    return drawn


def test_two_processes_share_a_stream_of_several_files(llama, tmp_path):
    """Every prompt is drawn once in a pass, as in a single file, and both end the pass together."""
    prompts = [f"a{row}" for row in range(18)] + [f"b{row}" for row in range(7)]
    first, second = launch("test_sampler:windows_of_files", folder=llama, out=tmp_path)
    for seen in (first, second):
        assert len(seen) == 6 and seen[:3] == seen[3:]
    windows = [one + other for one, other in zip(first, second, strict=True)]
    assert windows[:3] == [[prompt for prompt in prompts[at : at + 8] for _ in range(2)] for at in (0, 8, 16)]
    assert len(complete_checkpoints(tmp_path / "out")) == 2


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_resumed_run_goes_on_in_the_pass_of_its_stream(strategy, shuffled, llama, tmp_path):
    """A pass has four updates. The run is resumed from each checkpoint, within passes and at their ends."""
    stream = Dataset.from_list([{"prompt": f"a{row}"} for row in range(8)]).to_iterable_dataset()

    def run(resume: str | None) -> tuple[list[list[str]], list[int], list[torch.Tensor]]:
        drawn: list[list[str]] = []

        def reward(prompts, completions, **kwargs):
            if not trainer.evaluating:
                drawn.append(prompts)
            return [len(text) / 8 for text in completions]

        trainer = build(
            llama, tmp_path, reward, stream, eval_dataset=stream.take(2), per_device_eval_batch_size=2, max_steps=10,
            save_strategy=strategy, save_steps=1, eval_strategy="epoch", shuffle_dataset=shuffled,
            gradient_accumulation_steps=2, per_device_train_batch_size=1,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        evaluated = [entry["step"] for entry in trainer.state.log_history if "eval_reward" in entry]
        return drawn, evaluated, [p.detach().clone() for p in trainer.model.parameters()]

    windows, evaluated, weights = run(None)
    assert evaluated == [4, 8, 10] and len(windows) == 10
    assert (windows[:4] == windows[4:8]) is not shuffled
    for step in range(1, 10) if strategy == "steps" else (4, 8):
        rest, evaluations, end = run(str(tmp_path / "out" / f"checkpoint-{step}"))
        assert (rest, evaluations) == (windows[step:], evaluated)
        assert all(torch.equal(a, b) for a, b in zip(weights, end, strict=True))


class EndPass(TrainerCallback):
    """Ends a pass over the data after the second update."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step == 2


def test_a_pass_that_a_callback_ends_is_followed_by_a_whole_one(llama, tmp_path):
    """A pass has four updates of two prompts. After two updates the second pass begins, also in a resumed run."""
    rows = Dataset.from_list([{"prompt": f"a{row}"} for row in range(8)])

    def run(resume: str | None) -> list[str]:
        drawn: list[str] = []

        def reward(prompts, completions, **kwargs):
            drawn.extend(prompts)
            return [0.0] * len(prompts)

        trainer = build(
            llama, tmp_path, reward, rows, num_train_epochs=3, max_steps=-1, save_strategy="steps", save_steps=1
        )
        trainer.add_callback(EndPass())
        trainer.train(resume_from_checkpoint=resume)
        return drawn

    drawn = run(None)
    assert len(drawn) == 20 and sorted(drawn[4:12]) == sorted(drawn[12:]) == sorted(rows["prompt"])
    for step in (1, 2, 3, 7):
        assert run(str(tmp_path / "out" / f"checkpoint-{step}")) == drawn[2 * step :]
