"""Reward functions that raise, hang or return nonsense: how their completions are treated, on every process."""

import asyncio
import functools
import logging
import math
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import gather_object
from common.tiny import save
from datasets import Dataset
from helpers.forked import launch
from helpers.runs import PROMPTS, build, letters, logged
from torch.distributed import DistBackendError

from tbrm_trl import TBRMConfig
from tbrm_trl.sources import reward_calls
from tbrm_trl.sources.returns import check_magnitude
from tbrm_trl.sources.reward_calls import LateError, RewardCalls
from tbrm_trl.trajectory import largest_return


def broken(prompts, completions, **kwargs):
    if PROMPTS[0] in prompts:
        raise KeyError("no such answer")
    return [1.0] * len(completions)


def slow(prompts, completions, **kwargs):
    if PROMPTS[0] in prompts:
        time.sleep(30)
    return [1.0] * len(completions)


async def slow_async(prompts, completions, **kwargs):
    if PROMPTS[0] in prompts:
        await asyncio.sleep(30)
    return [1.0] * len(completions)


async def broken_async(prompts, completions, **kwargs):
    return broken(prompts, completions)


def times_out_itself(completions, **kwargs):
    raise TimeoutError("the judge did not answer")


async def cancels_a_task(completions, **kwargs):
    task = asyncio.create_task(asyncio.sleep(30))
    task.cancel()
    await task


def cancels_a_loop(completions, **kwargs):
    asyncio.run(cancels_a_task(completions))


def exits(completions, **kwargs):
    sys.exit(3)


async def exits_async(completions, **kwargs):
    sys.exit()


async def blocks_the_loop(completions, **kwargs):
    time.sleep(1)
    return [1.0] * len(completions)


FAILING = {"raised": (broken, broken_async), "late": (slow, slow_async)}


@pytest.mark.parametrize("reason", FAILING)
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(("policy", "reward"), [("skip", math.nan), (-1.0, -1.0), ("0.5", 0.5)])
def test_completions_of_a_call_that_failed(policy, reward, is_async, reason, tmp_path):
    """Two windows of four; one of them holds the prompt on which the call fails."""
    function = FAILING[reason][is_async]
    trainer = build(save(tmp_path / "model"), tmp_path, [function, letters], reward_on_error=policy, max_steps=2,
                    reward_timeout=0.5, per_device_train_batch_size=4, shuffle_dataset=False)  # fmt: skip
    began = time.monotonic()
    trainer.train()
    assert time.monotonic() - began < 20
    name = function.__name__
    first, second = trainer.windows
    given = [one.rewards[name] for one in first]
    assert all(map(math.isnan, given)) if math.isnan(reward) else given == [reward] * 4
    assert [one.rewards[name] for one in second] == [1.0] * 4
    # With "skip" the verdict is unknown, and the other function's reward is no verdict on these completions.
    assert [one.reward for one in first] == pytest.approx(
        [one.rewards["letters"] + reward for one in first], nan_ok=True
    )
    assert logged(trainer, "left_out/unscored") == [float(math.isnan(reward)), 0.0]
    other = next(one for one in FAILING if one != reason)
    assert logged(trainer, f"rewards/{name}/{reason}") == [1.0, 0.0]
    assert logged(trainer, f"rewards/{name}/{other}") == logged(trainer, f"rewards/letters/{reason}") == [0.0, 0.0]


def test_the_share_of_failures_in_an_evaluation_is_of_its_rows(tmp_path):
    """Two calls, of two rows and of one; the mean over calls would be a half."""
    rows = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS[2::-1]])
    trainer = build(save(tmp_path / "model"), tmp_path, broken, reward_on_error="skip", eval_dataset=rows,
                    per_device_eval_batch_size=2)  # fmt: skip
    metrics = trainer.evaluate()
    failed = metrics["eval_rewards/broken/raised"]
    assert failed == metrics["eval_left_out/unscored"] and failed in (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_the_share_of_failures_is_of_rollouts(tmp_path):
    """A judge that fails on a logged row says nothing of the rollouts."""
    data = [{"prompt": prompt, "completion": None} for prompt in PROMPTS[1:]]
    data = Dataset.from_list([*data, *[{"prompt": PROMPTS[0], "completion": "ab"}] * 4])
    trainer = build(save(tmp_path / "model"), tmp_path, broken, reward_on_error="skip", train_dataset=data,
                    logged_fraction=0.5, per_device_train_batch_size=4, max_steps=1)  # fmt: skip
    trainer.train()
    assert logged(trainer, "rewards/broken/raised") == [0.0] and logged(trainer, "left_out/unscored") == [0.5]


@pytest.mark.parametrize("scored", [True, False])
def test_a_function_of_weight_0_scores_nothing(scored, tmp_path):
    """TRL counts a row that it alone looked at as one of reward 0."""

    def some(prompts, **kwargs):
        return [1.0 if scored and prompt in PROMPTS[::2] else None for prompt in prompts]

    trainer = build(save(tmp_path / "model"), tmp_path, [some, letters], reward_weights=[1.0, 0.0], max_steps=1,
                    per_device_train_batch_size=8)  # fmt: skip
    trainer.train()
    assert logged(trainer, "reward") == ([1.0] if scored else []), trainer.state.log_history
    assert logged(trainer, "reward_std") == ([0.0] if scored else [])
    assert len(logged(trainer, "rewards/letters/mean")) == 1


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (broken, KeyError, "no such answer"),
        (broken_async, KeyError, "no such answer"),
        (slow, LateError, r"'slow' took longer than reward_timeout=0.5 seconds for 4 completions"),
        (slow_async, LateError, r"'slow_async' took longer than reward_timeout=0.5 seconds"),
        (blocks_the_loop, LateError, r"'blocks_the_loop' took longer than reward_timeout=0.5 seconds"),
        (exits, RuntimeError, r"it called sys.exit\(3\)"),
        (exits_async, RuntimeError, r"it called sys.exit\(\)"),
        (times_out_itself, TimeoutError, "the judge did not answer"),
    ],
)
def test_by_default_the_run_ends_with_the_functions_own_error(function, error, message, tmp_path):
    trainer = build(save(tmp_path / "model"), tmp_path, function, reward_timeout=0.5, per_device_train_batch_size=4,
                    shuffle_dataset=False)  # fmt: skip
    with pytest.raises(error, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("function", [cancels_a_task, cancels_a_loop, exits, exits_async])
@pytest.mark.parametrize("limit", [None, 30.0])
def test_an_exit_and_a_task_that_is_cancelled_inside_are_failures(function, limit, tmp_path):
    """`CancelledError` and `SystemExit` are no `Exception`: they would end only this process, or TRL's event loop."""
    trainer = build(save(tmp_path / "model"), tmp_path, [function, letters], reward_on_error="skip", max_steps=1,
                    reward_timeout=limit)  # fmt: skip
    trainer.train()
    assert logged(trainer, f"rewards/{function.__name__}/raised") == [1.0]


def test_a_call_that_is_cancelled_from_outside_ends():
    async def cancelled() -> None:
        task = asyncio.create_task(RewardCalls().guarded(slow_async, "slow")(PROMPTS[:1], completions=["a"]))
        await asyncio.sleep(0.1)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())


def test_nonsense_ends_the_run_whatever_the_policy(tmp_path, caplog):
    """It is said once, and not that the function returned None."""
    trainer = build(save(tmp_path / "model"), tmp_path, lambda completions, **kwargs: 1.0, reward_on_error="skip")
    with pytest.raises(ValueError, match=r"Reward function '<lambda>' returned 1.0 \(a float\)"):
        trainer.train()
    (said,) = [one for one in caplog.messages if "eward function" in one]
    assert said.endswith("where its verdict is unknown).") and "first of them" not in said


def test_the_first_failures_are_logged_with_a_completion(caplog):
    calls = RewardCalls()
    call = calls.guarded(times_out_itself, "judge")
    with caplog.at_level(logging.WARNING):
        for number in range(5):
            assert math.isnan(*call(completions=[f"completion {number}\x1b[2J"]))
    said = [one for one in caplog.messages if "the judge did not answer" in one]
    assert len(said) == reward_calls.SHOWN == 3 and "completion 0" in said[0] and "\x1b" not in said[0]
    assert [(one.function, one.reason) for one in calls.taken()] == [("judge", "raised")] * 5
    assert calls.taken() == []


def test_which_verdicts_are_unknown():
    """Those of functions with a weight that are NaN; None means that a function does not apply."""
    calls, names = RewardCalls(), ["judge", "watcher", "broken"]
    nan = math.nan
    functions = [lambda completions: [1.0, None, nan, 0.0], lambda completions: [nan, 1.0, 1.0, 1.0], times_out_itself]

    def unknown(*weights: float) -> list[bool]:
        for function, name in zip(functions, names, strict=True):
            calls.guarded(function, name)(completions=["a", "b", "c", "d"])
        return calls.unknown(4, names, weights)

    assert unknown(1.0, 0.0, 0.0) == [False, False, True, False]
    assert unknown(1.0, 0.5, 0.0) == [True, False, True, False]
    assert unknown(1.0, 0.5, 1.0) == [True] * 4
    assert calls.unknown(4, names, [1.0, 1.0, 1.0]) == [False] * 4  # of no call


def test_a_slow_call_is_named(caplog, monkeypatch):
    monkeypatch.setattr(reward_calls, "SLOW_AFTER", 0.2)
    with caplog.at_level(logging.WARNING):
        RewardCalls().guarded(lambda completions: time.sleep(0.6) or [1.0], "judge")(completions=["a"])
        RewardCalls().guarded(lambda completions: [1.0], "quick")(completions=["a"])
    assert len(caplog.messages) == 1 and "'judge' has been running for 0.2 seconds" in caplog.messages[0]


def test_what_is_late_logs_nothing_any_more():
    seen: list[Any] = []

    def late(completions, log_metric):
        log_metric("before", 1)
        time.sleep(0.5)
        log_metric("after", 1)
        return [1.0]

    call = RewardCalls(limit=0.2).guarded(late, "late")
    assert math.isnan(*call(completions=["a"], log_metric=lambda *one: seen.append(one)))
    time.sleep(0.6)
    assert seen == [("before", 1)]


@pytest.mark.parametrize("device", [None, 3])
def test_the_thread_is_on_its_callers_device(device, monkeypatch):
    """CUDA's current device is each thread's own, and the first one in a new thread."""
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: device is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda one: chosen.append((one, threading.current_thread())))
    called: list[Any] = []
    RewardCalls(limit=5.0).guarded(lambda completions: called.append(threading.current_thread()) or [1.0], "f")(
        completions=["a"]
    )
    assert chosen == ([] if device is None else [(3, called[0])])
    assert called[0] is not threading.current_thread()


def test_a_callable_object_and_a_partial_can_be_late():
    class Judge:
        def __call__(self, completions, seconds=5.0):
            time.sleep(seconds)
            return [1.0] * len(completions)

    calls = RewardCalls(limit=0.1, failed=-2.0)
    assert calls.guarded(functools.partial(Judge(), seconds=3.0), "judge")(completions=["a", "b"]) == [-2.0, -2.0]
    assert calls.guarded(functools.partial(Judge(), seconds=0.0), "judge")(completions=["a", "b"]) == [1.0, 1.0]


@pytest.mark.parametrize(("reward", "is_refused"), [(1e15, False), (-1e15, False), (3e15, True), (-math.inf, True)])
def test_rewards_that_float32_cannot_square(reward, is_refused):
    """β = 0.002: R/β = 1e18 is the limit, whose squares float32 sums."""
    rewards = torch.tensor([[1.0, math.nan], [0.0, reward / 2]])
    assert largest_return(0.002) == pytest.approx(2e15)
    assert torch.tensor(1e18).square().mul(100).isfinite()
    if not is_refused:
        check_magnitude(rewards, torch.tensor([1.0, 2.0]), ["a", "b"], 0.002)
        return
    with pytest.raises(
        ValueError, match=r"'b' returned .* for rollout 1 of 2\. With beta=0\.002 a reward may reach 2e\+15"
    ):
        check_magnitude(rewards, torch.tensor([1.0, 2.0]), ["a", "b"], 0.002)
    check_magnitude(rewards, torch.tensor([1.0, 0.0]), ["a", "b"], 0.002)  # one that only watches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_on_error": "ignore"}, "`reward_on_error='ignore'` is unknown"),
        ({"reward_on_error": math.inf}, "`reward_on_error=inf` is unknown"),
        ({"reward_timeout": 0}, "`reward_timeout=0` must be positive"),
    ],
)
def test_misuse(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TBRMConfig(str(tmp_path), use_cpu=True, **options)


def fail_on_one(folder: str, out: str, reward: str, **options: Any) -> dict[str, Any]:
    """In each of two processes: the first alone meets the prompt on which the function fails."""
    trainer = build(folder, Path(out), globals()[reward], per_device_train_batch_size=4, shuffle_dataset=False,
                    max_steps=1, **options)  # fmt: skip
    began, error = time.monotonic(), None
    try:
        trainer.train()
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    return {
        "error": error,
        "seconds": time.monotonic() - began,
        "rewards": gather_object([[one.reward for one in window] for window in trainer.windows]),
        "log": trainer.state.log_history,
    }


def test_processes_agree_on_a_failure(tmp_path):
    options = {"folder": save(tmp_path / "model"), "out": tmp_path, "reward_timeout": 1.0}
    first, second = launch("test_reward_calls:fail_on_one", reward="slow", **options)
    assert first["error"].startswith("LateError: Reward function 'slow' took longer")
    assert second["error"] == "RuntimeError: A reward function failed on process 0, which says how in its output."
    assert max(first["seconds"], second["seconds"]) < 60


def test_processes_agree_on_what_is_skipped(tmp_path):
    seen = launch("test_reward_calls:fail_on_one", folder=save(tmp_path / "model"), out=tmp_path, reward="broken",
                  reward_on_error="-2")[0]  # fmt: skip
    assert seen["error"] is None and seen["rewards"] == [[-2.0] * 4, [1.0] * 4]
    assert seen["log"][0]["rewards/broken/raised"] == 0.5


def wait_for_the_other(seconds: float, limit: int) -> float | None:
    """Seconds after which the first process gave up on the second, under `use_cpu=True`."""
    TBRMConfig("unused", use_cpu=True, bf16=False, report_to="none", ddp_timeout=limit)
    if torch.distributed.get_rank() == 1:
        time.sleep(seconds)
        return None
    began = time.monotonic()
    with pytest.raises((RuntimeError, DistBackendError), match=r"(?i)time"):
        torch.distributed.barrier()
    return time.monotonic() - began


def test_the_groups_time_limit_holds_on_cpus(tmp_path):
    waited = launch("test_reward_calls:wait_for_the_other", seconds=20, limit=4)[0]
    assert 3 < waited < 15
