"""Rewards in worker processes: hangs, crashes and exceptions cost one row, from any thread."""

import json
import math
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import reward_functions
from helpers.runs import build

from tbrm_trl.checks.rewards import check_reward_arguments
from tbrm_trl.files import source_of
from tbrm_trl.rewards import InWorkers, RewardError, load, mathematics
from tbrm_trl.rewards.returned import NotRewardsError
from tbrm_trl.rewards.workers import WorkerError

NAN = math.nan


@pytest.fixture(scope="module")
def misbehaving():
    workers = InWorkers(reward_functions.misbehaving, time_limit=0.5, workers=2)
    workers(["warm"])
    yield workers
    workers.close()


def test_rows_that_fail(misbehaving):
    """Each loses only its own reward. The others have their rewards, in order."""
    misbehaving.counts.clear()
    completions = ["a", "hang", "ccc", "die", "raise", "recurse", "fill memory", "dddd", "sleep", "eeeee"]
    started = time.perf_counter()
    rewards = misbehaving(completions)
    assert rewards == pytest.approx([1.0, NAN, 3.0, NAN, NAN, NAN, NAN, 4.0, NAN, 5.0], nan_ok=True)
    assert misbehaving.counts == {"late": 2, "crashed": 1, "raised": 3}
    assert 0.5 < time.perf_counter() - started < 10  # two limits, in two workers, and three new workers
    assert misbehaving(["a", "bb"]) == [1.0, 2.0]


def test_from_threads(misbehaving):
    results: dict[int, list] = {}

    def call(row: int) -> None:
        results[row] = misbehaving(["x" * row, "hang" if row == 1 else "y"])

    threads = [threading.Thread(target=call, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert math.isnan(results[1].pop())
    assert results == {0: [0.0, 1.0], 1: [1.0], 2: [2.0, 1.0], 3: [3.0, 1.0]}


def test_threads_share_the_workers(tmp_path):
    """Two rows of two threads are judged at once: each waits for the other."""
    workers = InWorkers(reward_functions.both_there, time_limit=20, workers=2)
    rewards: dict[str, list] = {}

    def call(name: str) -> None:
        rewards[name] = workers([name], folder=[str(tmp_path)])

    threads = [threading.Thread(target=call, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rewards == {"a": [1.0], "b": [1.0]} and not workers.counts
    assert workers(["a", "b"], folder=[str(tmp_path)] * 2) == [1.0, 1.0]
    workers.close()


def test_what_is_logged(misbehaving):
    extra, metrics = {}, {}
    rewards = misbehaving(["a b", "raise", "c"], log_extra=extra.__setitem__, log_metric=metrics.__setitem__)
    assert rewards == pytest.approx([3.0, NAN, 1.0], nan_ok=True)
    assert extra == {"first letter": ["a", None, "c"]}
    assert metrics.pop("words") == 1.5
    assert metrics == {"misbehaving/late": 0.0, "misbehaving/crashed": 0.0, "misbehaving/raised": pytest.approx(1 / 3)}


def test_columns_and_failed_rewards():
    with_column = InWorkers(reward_functions.weighted_column, workers=1, failed=-1.0)
    # Columns are lists with a value per row; other arguments from TRL are not sent to workers.
    assert with_column(["a", "b"], weight=[1, "no number"], trainer_state=object(), other=[1, 2, 3]) == [1.0, -1.0]
    assert with_column([], weight=[]) == []
    with_column.close()
    nothing = InWorkers(reward_functions.length, workers=1)
    assert nothing(["", "ab"]) == [None, 2.0] and not nothing.counts
    nothing.close()
    assert nothing(["abc"]) == [3.0]  # starts again
    nothing.close()


def test_environments_stay_here():
    """TRL passes one for each completion. A lock cannot be sent to a process."""
    workers = InWorkers(mathematics.correct, workers=1)
    assert workers(["\\boxed{4}"], solution=["4"], environments=[threading.Lock()]) == [1.0]
    assert workers.counts["crashed"] == 0
    workers.close()


def test_its_source_is_what_decides_a_verdict(misbehaving):
    """A second process, run or machine finds the samples and windows of the first: no id, count or core is in it."""
    program = """
        import json
        from helpers import reward_functions
        from tbrm_trl.files import source_of
        from tbrm_trl.rewards import InWorkers
        print(json.dumps(source_of(InWorkers(reward_functions.misbehaving, time_limit=0.5, workers=1))))
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    elsewhere = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, text=True, stdout=subprocess.PIPE, check=True
    )
    misbehaving(["a"])
    here = json.loads(json.dumps(source_of(misbehaving)))
    assert here == json.loads(elsewhere.stdout) and "fill memory" in str(here)
    for other in (
        InWorkers(reward_functions.misbehaving, time_limit=1.0),
        InWorkers(reward_functions.misbehaving, time_limit=0.5, failed=0.0),
        InWorkers(reward_functions.length, time_limit=0.5),
    ):
        assert json.loads(json.dumps(source_of(other))) != here


def test_a_row_that_raises_ends_the_call_where_that_is_asked():
    """The error has the exception, its place and its completion. A row that hangs loses only itself; workers go on."""
    workers = InWorkers(reward_functions.misbehaving, time_limit=0.5, workers=1, raises=True)
    with pytest.raises(RewardError, match=r"misbehaving raised ValueError: raise, .*functions.py:\d+.*'raise'"):
        workers(["a", "raise", "recurse"])
    assert workers(["bb", "hang", "ccc"]) == pytest.approx([2.0, NAN, 3.0], nan_ok=True)
    assert workers.counts == {"raised": 1, "late": 1}
    workers.close()
    infinite = InWorkers(reward_functions.weighted_column, workers=1, raises=True)
    with pytest.raises(RewardError, match="the reward is inf, not a finite number"):
        infinite(["a"], weight=["inf"])
    infinite.close()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (1.0, r"'giving' returned 1.0 \(a float\). Return a list of 1 number,"),
        ({0: 1.0}, r"returned \{0: 1.0\} \(a dict\)"),
        ([1.0, 2.0], "returned 2 rewards for 1 completions"),
        (["1"], r"returned '1' \(a str\) for completion 0"),
        (np.ones((1, 1)), r"returned an array of shape \(1, 1\)"),
    ],
)
@pytest.mark.parametrize("raises", [False, True])
def test_what_is_no_reward_ends_the_call(returned, message, raises):
    """It is a mistake in the function, whatever is to happen if it raises."""
    workers = InWorkers(reward_functions.giving, workers=1, raises=raises)
    with pytest.raises(NotRewardsError, match=message):
        workers(["a"], given=[returned])
    assert workers(["a"], given=[np.ones(1)]) == [1.0] and not workers.counts
    workers.close()


@pytest.mark.parametrize(("option", "value"), [("time_limit", 0), ("time_limit", NAN), ("workers", 0), ("workers", -1)])
def test_options_that_no_worker_can_have(option, value):
    with pytest.raises(ValueError, match=f"{option} must be .*, not {value}"):
        InWorkers(reward_functions.length, **{option: value})


@pytest.mark.parametrize("limit", [math.inf, 1e10])
def test_no_time_limit(limit):
    """No system call waits for that long."""
    workers = InWorkers(reward_functions.length, time_limit=limit, workers=1)
    workers.start()
    assert workers(["a", "bb"]) == [1.0, 2.0] and not workers.counts
    workers.close()


def test_a_script_that_leaves_its_workers_ends_without_a_word(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from tbrm_trl.rewards import InWorkers, correct\n\ndef own():\n    pass\n\n"
        "workers = InWorkers(correct, workers=2)\nprint(workers(['1', '2'], solution=['1', '1']))\n"
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert ended.stdout == "[1.0, 0.0]\n" and "Traceback" not in ended.stderr and "ignored" not in ended.stderr


def test_a_column_that_is_missing_is_found_before_training():
    """Workers take what their function takes, also after they were sent to another process."""
    for workers in load(["math", "reasoning_gym"])[0]:
        with pytest.raises(ValueError, match=r"needs '(solution|gym)', but the training set has no such column"):
            check_reward_arguments([pickle.loads(pickle.dumps(workers))], "the training set", ["prompt"], more=False)


def test_what_cannot_run_in_workers():
    with pytest.raises(TypeError, match="coroutine"):
        InWorkers(reward_functions.later)
    with pytest.raises(WorkerError, match="top level"):
        InWorkers(lambda completions, **columns: [])(["a"])
    with pytest.raises(WorkerError, match=r"could not start.*not here"):
        InWorkers(reward_functions.Unloadable(), workers=1)(["a"])


def test_a_worker_that_is_started_beforehand_is_the_one_that_scores():
    workers = InWorkers(reward_functions.length, workers=1)
    workers.start()
    (worker,) = workers._idle
    workers.start()
    assert workers(["abc"]) == [3.0] and workers._idle == [worker]
    workers.close()


@pytest.mark.parametrize("on_error", ["raise", "skip", 0.0])
def test_what_cannot_run_in_workers_is_refused_before_a_model_is_loaded(on_error, tmp_path):
    """It is no verdict on a completion, so no option passes it over."""
    function = InWorkers(reward_functions.Unloadable(), workers=1)
    with pytest.raises(ValueError, match=r"'Unloadable' cannot judge. A reward worker could not start: .*not here"):
        build("no/such/model", tmp_path, function, reward_on_error=on_error)


def test_a_worker_that_cannot_start_later_ends_the_run(llama, tmp_path):
    """As one whose package is removed while the run is under way."""
    function = InWorkers(reward_functions.length, workers=1)
    trainer = build(llama, tmp_path, function, reward_on_error="skip")
    function.close()
    function.function = reward_functions.Unloadable()
    with pytest.raises(WorkerError, match="could not start"):
        trainer.train()


@pytest.mark.launch
@pytest.mark.parametrize("command", [["package/script.py"], ["-m", "package.script"]], ids=["path", "module"])
def test_a_function_of_the_main_script(command, tmp_path):
    """A worker runs the script's top level, and not what is under its guard."""
    script = tmp_path / "package/script.py"
    script.parent.mkdir()
    script.with_name("numbers_.py").write_text("TWO = 2.0")
    script.write_text(
        textwrap.dedent(f"""
        from {"." if "-m" in command else ""}numbers_ import TWO
        from tbrm_trl.rewards import InWorkers

        def double(completions, **columns):
            return [TWO * len(one) for one in completions]

        if __name__ == "__main__":
            print(InWorkers(double, workers=1)(["abc"]))
        """)
    )
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[6.0]", done.stderr


def test_a_worker_does_not_load_torch():
    """It takes the memory of sympy, not that of a trainer."""
    workers = InWorkers(mathematics.correct, workers=1)
    assert workers(["\\boxed{1+x}"], solution=["x+1"]) == [1.0]
    (worker,) = workers._idle
    assert "libtorch" not in Path(f"/proc/{worker.process.pid}/maps").read_text()
    workers.close()


def test_a_worker_ends_by_itself_once_nothing_asks_it():
    """It does so also if a kill left no time to end it. A process that waits forever would keep its memory."""
    workers = InWorkers(reward_functions.length, workers=1)
    assert workers(["abc"]) == [3.0]
    (worker,) = workers._idle
    worker.connection.close()
    assert worker.process.wait(timeout=60) == 0


def test_a_worker_in_a_long_call_ends_with_its_killed_parent(tmp_path):
    """As after the kernel killed the run for its memory: nothing can tell the worker, and it may hold gigabytes."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        from helpers.reward_functions import misbehaving
        from tbrm_trl.rewards import InWorkers

        workers = InWorkers(misbehaving, time_limit=1000, workers=1)
        workers.start()
        print(workers._idle[0].process.pid, flush=True)
        workers(["long call"])
        """)
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path[1:]])}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        worker = Path(f"/proc/{parent.stdout.readline().strip()}")
        assert worker.exists()
        before = cpu_ticks(worker)
        while cpu_ticks(worker) < before + 30:  # it is in the call
            time.sleep(0.1)
        parent.kill()
    assert ends(worker)


def test_what_a_late_function_has_started_ends_with_its_worker(tmp_path):
    workers = InWorkers(reward_functions.starts_a_program, time_limit=2, workers=1)
    assert math.isnan(workers(["a"], path=[str(tmp_path / "pid")])[0])
    assert ends(Path("/proc") / (tmp_path / "pid").read_text())


def ends(process: Path) -> bool:
    """Whether a process ends within a minute."""
    for _ in range(600):
        if not process.exists() or state(process) == "Z":
            return True
        time.sleep(0.1)
    return False


def cpu_ticks(process: Path) -> int:
    return int((process / "stat").read_text().rpartition(")")[2].split()[11])


def state(process: Path) -> str:
    return (process / "stat").read_text().rpartition(")")[2].split()[0]


def test_by_name():
    functions, weights = load({"math": 1.0, "length(limit=10, free=4)": 0.5, "helpers.reward_functions.length": 2.0})
    assert weights == [1.0, 0.5, 2.0]
    assert [function.__name__ for function in functions] == ["correct", "length", "length"]
    assert functions[1](["abc", "x" * 7, "x" * 20]) == [0.0, -0.5, -1.0]
    assert functions[1](["abc"], completion_ids=[[0] * 10]) == [-1.0]
    assert isinstance(functions[2], InWorkers) and functions[2](["abc"]) == [3.0]
    assert functions[2].raises and not functions[0].raises  # an error in the user's own code must be raised
    assert not load("helpers.reward_functions.length", raises=False)[0][0].raises
    functions[2].close()
    assert load(["format", reward_functions.length])[0][1] is reward_functions.length
    assert load("format")[0][0](["\\boxed{1}", "\\boxed{}", "\\boxed{1", "1"]) == [1.0, 0.0, 0.0, 0.0]
    assert load("thinking")[0][0](["<think>a</think>b", "a</think> b", "b", "<think>a</think>"]) == [1.0, 1.0, 0.0, 0.0]
    assert load("helpers.reward_functions:later")[0] == [reward_functions.later]


@pytest.mark.parametrize(
    ("message", "reward"),
    [
        ({"reasoning_content": "2+2", "content": "4"}, 1.0),
        ({"thinking": "2+2", "content": [{"type": "text", "text": "4"}]}, 1.0),
        ({"reasoning_content": "2+2", "content": " "}, 0.0),  # no answer
        ({"reasoning_content": "2+2"}, 0.0),
        ({"reasoning_content": "", "thinking": None, "content": "4"}, 0.0),  # no reasoning
        ({"reasoning_content": "2+2", "content": "a</think>4"}, 0.0),  # it ends twice
        ({"content": "<think>2+2</think>4"}, 1.0),  # not parsed
    ],
)
def test_reasoning_beside_the_content(message, reward):
    """TRL puts it there when it parses responses. The policy's last message counts, whatever came before."""
    thinking = load("thinking")[0][0]
    before = {"role": "assistant", "content": "a", "reasoning_content": "" if reward else "b"}
    assert thinking([[{"role": "assistant", **message}], message]) == [reward] * 2
    assert thinking([[before, {"role": "tool", "content": "c"}, {"role": "assistant", **message}]]) == [reward]
    assert thinking([[{"role": "user", "content": "a", "thinking": "b"}]]) == [0.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mathh", "Names: math"), ("no_module.reward", "cannot be imported"),
        ("helpers.reward_functions.none", "cannot be"),
        ("length", "limit"), ("length(2048)", "written as"), ("math(x=1)", "no arguments"),
        ("length(limit=1, free=2)", "free"),
        ("helpers.reward_functions.Unloadable(b=2)", r"needs other arguments: \(\)"),
        ("helpers.reward_functions.length(n=1)", r"needs other arguments: \(completions, \*\*columns\)"),
    ],
)  # fmt: skip
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        load(name)
