"""The comparison with other methods: an equal search for each, and numbers from its curves."""

import math
import re
from collections import Counter
from dataclasses import replace

import comparison
import pytest
from common import tasks
from common.launch import ROOT
from common.report import Store
from comparison import METHODS, SETTINGS, Comparison, area, first_at, interval
from numpy import array

RATES = SETTINGS["sorting"].rates  # 5e-4, 1e-3, 2e-3


def searched(tmp_path, best_rate, task="sorting", given=None):
    """A search with made-up results, which are the better, the nearer their rate is to the method's best one.

    `given` names the accuracy at some rates of some methods.
    """
    search = Comparison(task, SETTINGS[task], Store(tmp_path / "runs.json"))
    while wanted := search.wanted():
        for run in wanted:
            accuracy = 1 - abs(math.log(run.rate / best_rate.get(run.method, 1e-3))) / 10
            accuracy = (given or {}).get((run.method, run.rate), accuracy)
            points = [[0, 0, 0.1, 0, 0.0], [1, 64, accuracy, 0, 1.0]]
            search.runs[str(run)] = {"run": vars(run), "processor": "one", "points": points}
    return search


def test_every_method_is_given_as_many_rates_as_the_one_that_needs_most(tmp_path):
    search = searched(tmp_path, {"TBRM": 8e-3, "GRPO": 5e-4})
    assert search.rates("TBRM") == pytest.approx([5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 16e-3])
    assert search.rates("GRPO") == pytest.approx([2.5e-4, *RATES])
    assert search.rates("RLOO") == list(RATES)
    for method in METHODS:
        tried = {one["run"]["rate"] for one in search.runs.values() if one["run"]["method"] == method}
        assert len(tried) == search.count == 6
        assert search.selected(method)[1] not in (min(tried), max(tried))


def test_a_rate_that_only_the_search_for_others_finds(tmp_path):
    """GRPO needs five rates, so TBRM gets five. One of them is then its best, for which it needs six, as all do."""
    found = {2.5e-4: 0.1, 5e-4: 0.2, 1e-3: 0.5, 2e-3: 0.4, 4e-3: 0.9, 8e-3: 0.3}
    found = {("TBRM", rate): accuracy for rate, accuracy in found.items()}
    search = searched(tmp_path, {"GRPO": 2.5e-4}, given=found)
    assert (len(search.rates("GRPO")), len(search.rates("TBRM"))) == (5, 3)
    assert search.selected("TBRM")[1] == 4e-3
    for method in METHODS:
        tried = {one["run"]["rate"] for one in search.runs.values() if one["run"]["method"] == method}
        assert len(tried) == search.count == 6


def test_a_knob_is_tried_at_the_best_rate_and_the_final_seeds_come_last(tmp_path):
    search = searched(tmp_path, {})
    of_rloo = [one["run"] for one in search.runs.values() if one["run"]["method"] == "RLOO"]
    knobs = {(run["knob"], run["rate"]) for run in of_rloo}
    assert knobs == {("n = 8", rate) for rate in RATES} | {("n = 4", 1e-3), ("n = 16", 1e-3)}
    assert all(len(search.finished(method)) == 5 for method in METHODS)
    assert not {run.seed for run in search.final("GRPO")} & set(SETTINGS["sorting"].selection_seeds)


def test_a_method_is_not_final_while_a_candidate_is_missing(tmp_path):
    search = searched(tmp_path, {})
    missing = next(name for name in search.runs if ": TBRM, no offset, lr 0.002, seed 101" in name)
    del search.runs[missing]
    assert search.finished("TBRM") == [] and len(search.finished("GRPO")) == 5
    assert [str(run) for run in search.wanted()] == [missing]
    comparison.report([search], "")  # a page of the finished runs


def test_the_page_of_a_task_has_its_own_runs_alone(tmp_path):
    search = searched(tmp_path, {})
    other = Comparison("sums", replace(SETTINGS["sums"], selection_seeds=(100,)), search.runs)
    assert "0.0005" in comparison.selection(search) and "0.0005" not in comparison.selection(other)


def test_some_methods_first(tmp_path):
    search = searched(tmp_path, {})
    chosen = search.final("TBRM")
    for name in [name for name in search.runs if ": RLOO" in name or ": A*-PO" in name]:
        del search.runs[name]
    some = Comparison("sorting", SETTINGS["sorting"], search.runs, ["GRPO", "TBRM"])
    assert some.wanted() == [] and some.final("TBRM") == chosen
    assert {run.method for run in search.wanted()} == {"RLOO", "A*-PO"}


def test_adapters_of_two_methods(tmp_path):
    setting = SETTINGS["operations-lora"]
    search = searched(tmp_path, dict.fromkeys(METHODS, 2e-4), "operations-lora")
    assert {one["run"]["method"] for one in search.runs.values()} == set(setting.methods)
    assert len(setting.methods) == 2
    assert "SmolLM2-135M with LoRA" in comparison.report([search], "")
    assert all(len(search.finished(method)) == len(setting.final_seeds) for method in setting.methods)


def test_numbers_of_a_curve():
    points = [[0, 0, 0.1, 0, 0.0], [2, 32, 0.3, 0, 4.0], [4, 64, 0.2, 0, 8.0]]
    assert area(array(points)[:, 2]) == pytest.approx((0.2 + 0.25) / 2)
    assert first_at(points, 0.2, 1) == pytest.approx(16) and first_at(points, 0.2, 4) == pytest.approx(2)
    assert first_at(points, 0.31, 1) == math.inf
    assert interval([0.1, 0.2, 0.3]) == "+0.200 (-0.048 to +0.448)"  # 0.2 ± 4.303 · 0.1/√3


@pytest.mark.parametrize("name", tasks.GYM_TASKS)
def test_no_final_run_sees_a_problem_of_the_search(name):
    of_search, of_final = ({one["question"] for one in tasks.problems(name, 3, search)} for search in (True, False))
    assert of_search and of_final and not of_search & of_final


def test_more_problems_to_train_on_keep_the_held_out_ones():
    entries = (tasks.problems(name, 3, selection=False) for name in ("operations", "all-operations"))
    few, many = ([one["question"] for one in of] for of in entries)
    assert many[:100] == few and len(many) == len(set(many)) == 263
    assert len(tasks.problems("all-operations", 3, selection=True)) == 100


def test_a_task_that_takes_the_search_of_another(tmp_path):
    """Its two best candidates are run with more seeds. One that is best on the first seed alone is not selected."""
    search = searched(tmp_path, {"GRPO": 1e-5, "TBRM": 4e-5}, "operations")
    setting = SETTINGS["all-operations"]
    wider = Comparison("all-operations", setting, search.runs)
    provisional = {method: search.selected(method) for method in setting.methods}
    assert {method: wider.selected(method) for method in setting.methods} == provisional
    more = wider.wanted()
    assert {(run.task, run.seed) for run in more} == {("operations", 101), ("operations", 102)}
    assert Counter(run.method for run in more) == dict.fromkeys(setting.methods, 4)
    for run in more:
        worse = run.method == "TBRM" and (run.knob, run.rate) == provisional["TBRM"]
        points = [[0, 0, 0.1, 0, 0.0], [1, 64, 0.0 if worse else 0.9, 0, 1.0]]
        search.runs[str(run)] = {"run": vars(run), "processor": "one", "points": points}
    assert [method for method in setting.methods if wider.selected(method) != provisional[method]] == ["TBRM"]

    finals = wider.wanted()  # of every seed, those of the first one first
    assert [(run.task, run.seed) for run in finals] == [
        ("all-operations", seed) for seed in setting.final_seeds for _ in setting.methods
    ]
    assert [(run.knob, run.rate) for run in finals[: len(setting.methods)]] == list(
        map(wider.selected, setting.methods)
    )
    assert "three operations*" in " ".join(comparison.selection(wider).split())

    earlier = [replace(run, rate=provisional["TBRM"][1], knob=provisional["TBRM"][0])
               for run in finals if run.method == "TBRM"]  # fmt: skip
    for run in [*earlier, *finals]:
        search.runs[str(run)] = {"run": vars(run), "processor": "one", "points": points}
    assert wider.superseded() == [earlier] and wider.wanted() == []
    page = comparison.report([wider], "")
    assert "| TBRM, not selected (1) |" in page and "2 more seeds" in page
    for run in finals:
        if run.method == "GRPO":  # while these are to come, what was selected before is the peer
            del search.runs[str(run)]
            other = replace(run, rate=2e-5)
            search.runs[str(other)] = {"run": vars(other), "processor": "one", "points": points}
    assert "10 of 10 final seeds of GRPO, not selected (1)" in " ".join(comparison.report([wider], "").split())


def test_the_reward_of_the_last_quarter_of_the_rollouts():
    runs = [{"logged": {"reward": [0.0] * 6 + [0.5, 1.0]}}, {"logged": {"reward": [0.0] * 3 + [0.25]}}]
    assert comparison.trained_on(runs) == "0.500 ± 0.250"
    assert comparison.trained_on([*runs, {"logged": {}}]) == comparison.trained_on([]) == ""


def test_the_best_constant_answer():
    """Of seed 0's 40 held-out pairs of numbers, 13 have the divisor 1, 13 have 2, and no other has more."""
    held_out = tasks.problems("divisors", 0, selection=False)[: tasks.HELD_OUT]
    pairs = [[int(n) for n in re.findall(r"\d+", one["question"])] for one in held_out]
    counts = Counter(math.gcd(*pair) for pair in pairs)
    assert counts.most_common(2) == [(1, 13), (2, 13)] and tasks.best_constant("divisors", 0) == 13 / 40


@pytest.mark.parametrize("document", ["README.md", "docs/method.md"])
def test_the_documents_intervals_are_the_pages(document):
    """Each with its mean: "+0.030 (-0.002 to +0.063)" on the page, "+0.030, −0.002 to +0.063" in running text."""

    def intervals(file: str) -> set[tuple[str, ...]]:
        text = " ".join((ROOT / file).read_text().replace("−", "-").split())
        return set(re.findall(r"([+-]\d\.\d+)(?:,| \() ?([+-]\d\.\d+) to ([+-]\d\.\d+)", text))

    assert intervals(document)
    assert intervals(document) <= intervals("docs/benchmarks/comparison.md")
