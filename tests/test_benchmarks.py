"""The benchmarks of a step's cost run, and account for all the time they report."""

import json
import statistics
from pathlib import Path

import paired_steps
import pool
import pytest
import step
import torch
from common.measure import peak_memory
from helpers.forked import run_script

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
LIMIT = 1800  # seconds of a hung benchmark; none takes a tenth of it, but other programs may run beside it


def quick(script: str, output: Path, *options: str | Path) -> str:
    """What a benchmark prints."""
    return run_script(BENCHMARKS / script, "--quick", "--output", output, *options, timeout=LIMIT)


def run(script: str, output: Path, *options: str) -> dict:
    """The JSON that a benchmark writes."""
    printed = quick(script, output, "--threads", "1", "--repetitions", "1", *options)
    name = script.replace(".py", "_cuda" if torch.cuda.is_available() else "")
    assert (output / f"{name}.md").read_text() in printed
    assert (output / f"{name}.png").exists()
    return json.loads((output / f"{name}.json").read_text())


def accounts_for_all(update: dict[str, float]) -> bool:
    return sum(update[part] for part in step.PARTS) == pytest.approx(update["total"], rel=1e-6)


def test_step(tmp_path):
    """Every method is measured on every length distribution; its parts are disjoint and make up the total."""
    raw = run("step.py", tmp_path)
    assert raw["losses"]["trainer"] == pytest.approx(raw["losses"]["minimal loop"], rel=1e-4)
    assert set(raw["measurements"]) == set(raw["overhead"]) == {"equal", "long_tail"}
    assert all([len(of[method]) for method in step.COMPARED] == [2, 2] for of in raw["overhead"].values())
    for of in raw["measurements"].values():
        assert set(of) == set(step.METHODS)
        for method, (measured,) in of.items():
            assert len(measured["updates"]) == (2 if method == "TBRM with replay" else 1)
            assert all(accounts_for_all(update) for update in measured["updates"])
            fresh = measured["updates"][0]
            idle = {"old policy"} - ({"old policy"} if method == "RLOO" else set())
            idle |= {"reference"} if method == "GRPO β=0" else set()
            assert {part for part in step.PARTS if not fresh[part]} == idle
            assert measured["memory"]["above_floor"] > 0
        replay = of["TBRM with replay"][0]["updates"][1]
        assert replay["generation"] == replay["reward"] == 0  # it draws nothing and calls no reward function
        floors = {method: measured[0]["memory"]["floor"] for method, measured in of.items()}
        assert floors["GRPO β=0"] == pytest.approx(floors["TBRM"] * 4 / 5, rel=1e-3)  # no reference
        assert floors["TBRM"] == pytest.approx(floors["minimal loop"], rel=1e-3)


def test_growth(tmp_path):
    raw = run("growth.py", tmp_path, "--axes", "length")
    for of in raw["axes"]["length"].values():
        assert all(accounts_for_all(update) for measured in of.values() for update in measured[0]["updates"])


@pytest.mark.launch
@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes would share one device")
def test_growth_over_processes(tmp_path):
    raw = run("growth.py", tmp_path, "--axes", "width", "processes")
    assert set(raw["processes"]) == {"1 x 1", "1 x 2", "2 x 1"}
    assert all(accounts_for_all(measured[0]["updates"][0]) for measured in raw["processes"].values())


@pytest.mark.launch
def test_faults(tmp_path):
    """A quick run kills once with each signal. A second call continues it: finished cases are not repeated."""
    for _ in range(2):
        printed = quick("faults.py", tmp_path)
        assert (tmp_path / "faults.md").read_text() in printed
    assert "kill/" not in printed
    runs = json.loads((tmp_path / "faults.json").read_text())["runs"]
    outcomes = {name: one["outcome"] for name, one in runs.items()}
    assert [outcomes[f"kill/TBRM/fresh/{one}/0"] for one in ("SIGKILL", "SIGTERM")] == ["exact", "exact"]
    assert len(outcomes) == 6 and outcomes["twice/TBRM/fresh"] == outcomes["twice/GRPO/fresh"] == "exact"


def test_lengths():
    """The median of 16 is a quarter of the longest; prompts are half the mean completion."""
    tail = step.works("model", rollouts=16, micro_batch=4, equal=64, longest=128, warm_up=4)["long_tail"]
    assert max(tail.lengths) == 128
    assert statistics.median(tail.lengths) == pytest.approx(32, abs=1)
    assert tail.prompt == pytest.approx(statistics.mean(tail.lengths) / 2, abs=0.5)
    assert sorted(tail.in_order_of(3).lengths) == sorted(tail.lengths)


def test_the_peak_is_counted_exactly():
    """4 + 2 MB, then 4 freed and 3 added: the peak is 6 MB above the start, on which 8 MB were alive already."""
    million = 1_000_000
    before = torch.empty(2 * million)
    with peak_memory() as peak:
        first, second = torch.empty(million), torch.empty(million // 2)
        del first
        third = torch.empty(3 * million // 4)
    assert peak.bytes == 6 * million
    del before, second, third


def test_long_run(tmp_path):
    """Every measurement is of a running process, and the page agrees with the numbers."""
    quick("long_run.py", tmp_path)
    seen = json.loads((tmp_path / "long_run.json").read_text())["seen"]
    assert [one["update"] for one in seen] == list(range(3, 61, 3))
    assert all(one["resident"] > 100 and one["descriptors"] > 2 and one["seconds"] > 0 for one in seen)
    assert f"{max(one['rollout_files'] for one in seen)} files" in (tmp_path / "long_run.md").read_text()


def test_update_cost(tmp_path):
    """This version compared with itself has the same operations."""
    quick("update_cost.py", tmp_path, "--before", BENCHMARKS.parent)
    raw = json.loads((tmp_path / "update_cost.json").read_text())
    assert raw["operations"]["now"] == raw["operations"]["before"] and len(raw["operations"]["now"]) > 50
    assert {name: len(ms) for name, ms in raw["ms"].items()} == {"now": 20, "before": 20}


def test_paired_steps(tmp_path):
    """Every method takes its turns with the planned lengths, and TBRM needs no more operations than GRPO."""
    quick("paired_steps.py", tmp_path)
    measured = json.loads((tmp_path / "paired_steps.json").read_text())["runs"]
    took, operations = measured["long_tail"]["seconds"], measured["long_tail"]["operations"]
    assert {name: len(seconds) for name, seconds in took.items()} == dict.fromkeys(
        paired_steps.COMPARED["long_tail"], 2
    )
    assert 0 < operations["TBRM"] <= operations[step.PEER]


@pytest.mark.parametrize(
    ("lengths", "ahead", "steps", "rows", "read_again", "staleness", "mixed"),
    [
        ([[1, 3], [1, 1]], 0, 4, 6, 0, [0, 0, 0, 0], 0),
        ([[1, 3], [1, 1]], 1, 4, 6, 0, [0, 0, 1, 0], 0),
        ([[1, 3], [1, 1]], 2, 3, 6, 0, [0, 0, 1, 1], 0),
        ([[1, 2], [3, 1]], 1, 4, 7, 1, [0, 0, 1, 0], 1),  # the third row has one token when the policy moves
    ],
)
def test_counts_of_a_pool_by_hand(lengths, ahead, steps, rows, read_again, staleness, mixed):
    counts = pool.count(lengths, ahead)
    assert (counts.steps, counts.row_steps, counts.read_again) == (steps, rows, read_again)
    assert (counts.staleness, counts.mixed) == (staleness, mixed)


@pytest.mark.launch
def test_staleness(tmp_path):
    """After the first ones, every window is exactly as old as its lag. Finished runs are not repeated."""
    for again in (False, True):
        printed = quick("staleness.py", tmp_path)
        assert (", lag 2, seed 0: " in printed) is not again
    runs = json.loads((tmp_path / "staleness.json").read_text())["runs"].values()
    assert len(runs) == 8
    for run in runs:
        assert run["ages"] == [min(step, run["lag"]) for step in range(4)]
        assert [updates for updates, _ in run["points"]] == [0, 2, 4]
    first, second = (next(iter(run["points"])) for run in runs if run["method"] == "group")
    assert first == second  # one start for both lags
    assert "| GRPO |" in (tmp_path / "staleness.md").read_text()
