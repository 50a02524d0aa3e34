"""The report of a run: what it computes, that it is one safe page, and that a browser shows it."""

import json
import math
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.runs import build

from tbrm_trl import TBRMTrainer, load_rollouts, run_log
from tbrm_trl.report import write_report
from tbrm_trl.report.__main__ import main
from tbrm_trl.report.charts import calibration, charts_of, log_mean_exp_by, plain, quantiles_by_step
from tbrm_trl.report.completions import completions_of, shortened, text_of
from tbrm_trl.report.page import html
from tbrm_trl.report.run import RunFolder, Updates, read_run
from tbrm_trl.run_log import Stopwatch, append_line, go_back, read_lines, trajectory_ids
from tbrm_trl.sources import saved_rollouts

NASTY = "</script><script>document.title='taken'</script><!-- <img src=x onerror=alert(1)> & \u2028 \x1b[31m \u202e"


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.S)[1])


def updates(**columns) -> Updates:
    number = len(next(iter(columns.values())))
    default = {
        "step": [1] * number, "id": [""] * number, "prompt": ["p"] * number, "origin": ["fresh"] * number,
        **dict.fromkeys(("reward", "residual", "soft_value", "length", "age"), [0.0] * number), "beta": [0.5] * number,
    }  # fmt: skip
    return Updates(**{name: np.array(column) for name, column in (default | columns).items()})


NONE = updates(step=np.zeros(0, int))


def chart(run: RunFolder, title: str) -> dict:
    (found,) = [one for one in charts_of(run) if one["title"] == title]
    return found


# ---- what a run writes -----------------------------------------------------------------------------------------------


def test_lines_of_a_resumed_run_are_read_once(tmp_path):
    """The run was killed after step 4, in the middle of a line, and went on from step 2."""
    file = tmp_path / "log.jsonl"
    for line in ({"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": math.nan},
                 {"step": 3, "loss": 3.0}, {"step": 4, "loss": 4.0}):  # fmt: skip
        append_line(file, line)
    with file.open("a") as lines:
        lines.write('\n{"step": 5, "lo')
    for line in ({"step": 3, "loss": 30.0}, {"step": 4, "loss": 40.0}):
        append_line(file, line)
    assert read_lines(file) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0, "eval_loss": None},
        {"step": 3, "loss": 30.0},
        {"step": 4, "loss": 40.0},
    ]


def test_lines_of_a_run_that_was_in_the_folder_before_are_dropped(tmp_path):
    """The old run logged every update, the new one logs every tenth, so its first line is of a later step."""
    for folder, name in ((tmp_path, "log.jsonl"), (tmp_path / "updates", "process-1.jsonl")):
        for step in (1, 2, 3):
            append_line(folder / name, {"step": step, "loss": 0.0})
    go_back(tmp_path, process=0, processes=2, step=0)
    go_back(tmp_path, process=1, processes=2, step=2)
    append_line(tmp_path / "log.jsonl", {"step": 10, "loss": 1.0})
    assert read_lines(tmp_path / "log.jsonl") == [{"step": 10, "loss": 1.0}]
    assert [line["step"] for line in read_lines(tmp_path / "updates/process-1.jsonl")] == [1, 2]
    assert not (tmp_path / "updates/process-0.jsonl").exists()
    go_back(tmp_path, process=0, processes=1, step=1)  # started again as one process
    assert [line["step"] for line in read_lines(tmp_path / "updates/process-1.jsonl")] == [1]


def test_a_new_run_has_no_line_of_an_earlier_evaluation_at_the_start(tmp_path):
    """A resumed run at step 0 keeps it."""
    append_line(tmp_path / "log.jsonl", {"step": 0, "eval_reward": 0.25})
    go_back(tmp_path, process=0, processes=1, step=0)
    assert read_lines(tmp_path / "log.jsonl") == [{"step": 0, "eval_reward": 0.25}]
    go_back(tmp_path, process=0, processes=1, step=None)
    append_line(tmp_path / "log.jsonl", {"step": 0, "eval_loss": 1.0})
    assert read_lines(tmp_path / "log.jsonl") == [{"step": 0, "eval_loss": 1.0}]


def test_a_stopwatch_counts_each_second_once(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 5.0, 10.0, 12.0])
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: next(now))
    timed = Stopwatch()
    with timed("outer"), timed("inner"):
        pass
    with timed("outer"):
        pass
    assert timed.taken() == {"outer": 1 + 1 + 2, "inner": 3}
    assert timed.taken() == {}


@pytest.fixture(scope="module")
def trained(llama, tmp_path_factory) -> Path:
    """The folder of a run of six updates, half of them replayed, that was stopped after the fourth and resumed."""
    folder = tmp_path_factory.mktemp("reported")
    options = dict(
        save_rollouts=True, replay_buffer_size=16, num_iterations=2, max_steps=6, save_strategy="steps", save_steps=2,
        trainer_class=TBRMTrainer,
    )  # fmt: skip
    build(llama, folder, **options).train()
    build(llama, folder, **options).train(resume_from_checkpoint=str(folder / "out/checkpoint-4"))
    return folder / "out"


def test_a_run_is_read_from_its_folder(trained):
    """Every trajectory of an update is there once, and its numbers are those of the log and of the saved rollouts."""
    run = read_run(trained)
    steps = [entry["step"] for entry in run.log]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert run.updates.step.tolist() == [step for step in steps for _ in range(2)]
    assert run.updates.origin.tolist() == ["fresh", "fresh", "replayed", "replayed"] * 3
    assert set(run.updates.beta) == {0.1} == {run.settings["beta"]}
    for entry in run.log:
        mine = run.updates.step == entry["step"]
        assert run.updates.residual[mine].mean() == pytest.approx(entry["residual/mean"], rel=1e-5)
        assert run.updates.soft_value[mine].mean() == pytest.approx(entry["soft_value"], rel=1e-5)
        assert ("generation_time" in entry) == (entry["step"] % 2 == 1)
        if "replay/age" in entry:
            assert run.updates.age[mine].mean() == entry["replay/age"]
    saved = load_rollouts(trained)
    assert run.rollouts.reward.tolist() == saved["reward"][:]
    assert run.rollouts.policy_step.tolist() == saved["policy_step"][:] == [0, 0, 2, 2, 4, 4]
    assert run.rollouts.rows(np.array([5, 0, 3]), saved.column_names) == [saved[place] for place in (5, 0, 3)]
    ids, prompts = trajectory_ids([(r["prompt_ids"], r["completion_ids"]) for r in saved])
    fresh = run.updates.origin == "fresh"
    assert sorted(run.updates.id[fresh]) == sorted(ids) and set(run.updates.prompt) == set(prompts)
    by_id = dict(zip(ids, saved["reward"], strict=True))
    assert [by_id[one] for one in run.updates.id] == run.updates.reward.tolist()


def test_a_run_without_its_own_log_is_read_from_its_checkpoint(trained, tmp_path):
    shutil.copytree(trained / "checkpoint-6", tmp_path / "run/checkpoint-6")
    shutil.copytree(trained / "checkpoint-4", tmp_path / "run/checkpoint-4")
    run = read_run(tmp_path / "run")
    assert [entry["step"] for entry in run.log] == [1, 2, 3, 4, 5, 6]
    assert run.rollouts is None and not len(run.updates) and not calibration(run.updates)
    assert {one["title"] for one in charts_of(run)} >= {"Reward", "Residual", "Time"}


def test_skips_that_count(tmp_path):
    """Two processes, an unfinished line, and a resumed run that has gone back to before one skip."""
    file = tmp_path / "skipped_updates/process-0.jsonl"
    for line in ({"update": 2}, {"update": 5}, {"step": 4}, {"update": 6}):
        append_line(file, line)
    append_line(file.with_name("process-1.jsonl"), {"update": 3})
    with file.open("a") as lines:
        lines.write('\n{"update": 7, "prompt_ids": [1, ')
    append_line(tmp_path / "log.jsonl", {"step": 6, "loss": 0.0})
    assert read_run(tmp_path).skipped == [2, 3, 6]


def write_windows(folder: Path, windows: int) -> None:
    """Two rollouts a window, of rewards 0 and 1. The first window's prompts are messages."""
    (folder / "rollouts").mkdir()
    for step in range(windows):
        prompt = "p" if step else [{"role": "user", "content": "p"}]
        columns = {
            "prompt": saved_rollouts.column_of([prompt] * 2),
            "completion": [f"completion {2 * step + i}" for i in (0, 1)],
            "prompt_ids": [[1], [1]], "completion_ids": [[2], [3]], "reward": [0.0, 1.0], "end": ["eos", "eos"],
            "policy_step": [step, step], "ref_log_probs": [[-0.5], [-0.25]],
        }  # fmt: skip
        file = saved_rollouts.rollouts_file(folder / "rollouts", step, 0)
        pq.write_table(pa.table(columns), file, write_page_checksum=True)
    append_line(folder / "log.jsonl", {"step": windows, "loss": 0.0})


def damage(file: Path, column: str, row_group: int) -> None:
    """Change the last byte of a column in a row group, so that reading it there gives a checksum error."""
    group = pq.read_metadata(file).row_group(row_group)
    chunk = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema.split(".")[0] == column)
    held = bytearray(file.read_bytes())
    held[(chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 1] ^= 1
    file.write_bytes(held)


def test_of_saved_rollouts_only_what_is_shown_is_read(tmp_path, monkeypatch):
    """The page has room for the first and the last of six rollouts. Damaged ones cannot have been read.

    The run merges its three windows between the two times that they are read.
    """
    monkeypatch.setattr(saved_rollouts, "MERGED", 3)
    monkeypatch.setattr("tbrm_trl.report.completions.SHOWN", 2)
    write_windows(tmp_path, 3)
    before = read_run(tmp_path)
    saved_rollouts.merge_rollouts(tmp_path / "rollouts", 3)
    (file,) = (tmp_path / "rollouts").iterdir()
    damage(file, "completion", 1)
    for window in range(3):
        damage(file, "ref_log_probs", window)
    with pytest.raises(ValueError, match="damaged"):
        load_rollouts(tmp_path)
    shown = data_of(write_report([tmp_path]).read_text())["runs"][0]["completions"]
    assert [(one["prompt"], one["completion"]) for one in shown] == [
        ("[user] p", "completion 0"), ("p", "completion 5"),
    ]  # fmt: skip
    assert completions_of(before.rollouts, NONE, 10**6) == shown

    damage(file, "completion", 2)
    with pytest.raises(ValueError, match=r"step-00000000-to-00000002.parquet is damaged .*Remove it"):
        write_report([tmp_path])


def test_rollouts_that_a_resumed_run_has_dropped_are_not_shown(tmp_path):
    """The run goes back to step 1 after the report has read how many rollouts there are."""
    write_windows(tmp_path, 2)
    run = read_run(tmp_path)
    saved_rollouts.rewind_rollouts(tmp_path / "rollouts", 1)
    assert len(run.rollouts) == 4
    shown = completions_of(run.rollouts, NONE, 10**6)
    assert [one["completion"] for one in shown] == ["completion 0", "completion 1"]


def test_a_folder_that_holds_no_run_is_named(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"holds no log of a run.*output_dir"):
        write_report([tmp_path])
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path / "typo")])
    assert ended.value.code == 1 and "typo holds no log" in capsys.readouterr().err


# ---- what it computes ------------------------------------------------------------------------------------------------


def test_calibration_by_hand():
    """Prompt a: β V = 1 and 2, β V − β δ = 0 and ln 3 at β = 1, so log mean exp is ln((1 + 3)/2). Prompt b: 5 and 5."""
    seen = updates(
        step=[1, 1, 1], prompt=["a", "b", "a"], soft_value=[1.0, 5.0, 2.0], residual=[1.0, 0.0, 2.0 - math.log(3)],
        beta=[1.0] * 3,
    )  # fmt: skip
    (period,) = calibration(seen)
    assert (period["first"], period["last"], period["prompts"]) == (1, 1, 2)
    assert period["realised"] == pytest.approx([math.log(2), 5.0], rel=1e-3)
    assert period["predicted"] == [1.5, 5.0]
    assert period["mean_gap"] == pytest.approx((1.5 - math.log(2)) / 2, rel=1e-3)
    assert period["rms_gap"] == pytest.approx((1.5 - math.log(2)) / math.sqrt(2), rel=1e-3)


def test_calibration_takes_the_beta_of_each_update(tmp_path, monkeypatch):
    """The run was resumed with another β: 1, then 0.1.

    In both updates β V = 0. β V − β δ is 0 and β ln 3, so β log mean exp is β ln((1 + 3)/2) = β ln 2. Where one period
    holds both updates, the prompt is two points.
    """
    for step, beta in ((1, 1.0), (2, 0.1)):
        line = {
            "step": step, "beta": beta, "id": ["x", "y"], "prompt": ["a", "a"], "origin": ["fresh"] * 2,
            "reward": [0.0] * 2, "residual": [0.0, -beta * math.log(3)], "soft_value": [0.0] * 2, "length": [1] * 2,
            "age": [0] * 2,
        }  # fmt: skip
        append_line(tmp_path / "updates/process-0.jsonl", line)
        append_line(tmp_path / "log.jsonl", {"step": step, "loss": 0.0})
    seen = read_run(tmp_path).updates
    assert seen.beta.tolist() == [1.0, 1.0, 0.1, 0.1]
    first, second = calibration(seen)
    assert first["realised"] == pytest.approx([math.log(2)], rel=1e-3)
    assert second["realised"] == pytest.approx([0.1 * math.log(2)], rel=1e-3)
    assert first["mean_gap"] == pytest.approx(-math.log(2), rel=1e-3)

    monkeypatch.setattr("tbrm_trl.report.charts.PERIODS", 1)
    (both,) = calibration(seen)
    assert both["realised"] == pytest.approx([0.1 * math.log(2), math.log(2)], rel=1e-3)


def test_log_mean_exp_takes_numbers_that_overflow():
    """β = 0.002: exp(1/β) is beyond float64. The mean of e^(1000/2) and e^(998/2) is e^500 (1 + 1/e)/2."""
    (value,) = log_mean_exp_by(np.zeros(2, int), np.array([1.0, 0.998]), np.full(2, 0.002))
    assert value == pytest.approx(1.0 + 0.002 * math.log((1 + math.exp(-1)) / 2))


def test_calibration_compares_a_part_of_the_run_at_a_time():
    seen = updates(step=[1, 2, 3] * 100, residual=[math.nan, 0.0, 0.0] * 100, prompt=list("abc") * 100)
    periods = calibration(updates(**{n: getattr(seen, n)[seen.step.argsort()] for n in ("step", "residual", "prompt")}))
    assert [(one["first"], one["last"], one["prompts"]) for one in periods] == [(2, 2, 1), (3, 3, 1)]


def test_quantiles_by_hand():
    steps, lines = quantiles_by_step(np.array([1, 1, 1, 2, 3]), np.array([3.0, 1.0, 2.0, math.nan, 7.0]))
    assert steps == [1, 3]
    assert lines["median"] == [2.0, 7.0] and lines["25%"] == [1.5, 7.0] and lines["95%"] == [2.9, 7.0]


def test_times_add_up_to_the_update():
    entry = {"step": 1, "step_time": 10.0, "generation_time": 6.0, "rewards_time": 1.0, "reference_time": 0.5}
    followed = {"step": 2, "step_time": 2.0, "rollouts_time": 1.5}
    lines = chart(RunFolder("r", [entry, followed], NONE), "Time")["lines"]
    assert lines == {
        "generation": [6.0, None], "rollouts": [None, 1.5], "rewards": [1.0, None], "reference": [0.5, None],
        "policy": [2.5, 0.5],
    }  # fmt: skip


def test_a_long_log_is_averaged_and_says_so():
    log = [{"step": step, "reward": float(step)} for step in range(1, 2501)]
    shown = chart(RunFolder("r", log, NONE), "Reward")
    assert shown["steps"][:2] == [1, 4] and shown["lines"]["reward"][:2] == [1.0, 3.0]
    assert shown["steps"][-1] == 2500 and shown["lines"]["reward"][-1] == 2499.0  # the mean of the last three
    assert len(shown["steps"]) == len(shown["lines"]["reward"]) and shown["entries_per_point"] == 3


def test_the_chart_of_evaluations_shows_rewards_and_accuracies_alone():
    """It shows no errors, deviations, shares of failures or times. A set may have any name."""
    shown = [
        "eval_m/avg@1", "eval_low_std/pass@4", "eval_reward", "eval_set_reward", "eval_rewards/f/mean",
        "eval_set_rewards/f/mean",
    ]  # fmt: skip
    others = [
        "eval_m/avg@1_error", "eval_reward_std", "eval_rewards/f/std", "eval_frac_reward_zero_std",
        "eval_rewards/f/raised", "eval_set_rewards/f/late", "eval_rewardbench_runtime",
    ]  # fmt: skip
    entry = {"step": 1, **dict.fromkeys(shown, 0.5), **dict.fromkeys(others, 0.08)}
    assert chart(RunFolder("r", [entry], NONE), "Evaluation")["lines"] == {name: [0.5] for name in shown}


def test_whole_numbers_are_not_rounded():
    assert plain([32768.0, 12345.67, 0.1234567, math.nan, math.inf]) == [32768.0, 12345.7, 0.123457, None, None]


def test_text_of_messages_and_long_texts():
    messages = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": None, "tool_calls": [{"n": 1}]}]
    assert text_of(messages) == '[user] 2 + 2\n[assistant] \n[{"n": 1}]'
    assert (
        text_of([{"role": "user", "content": [{"type": "text", "text": "日"}]}])
        == '[user] [{"type": "text", "text": "日"}]'
    )
    assert shortened("x" * 3000) == "x" * 3000
    assert "[… 2000 characters are not shown …]" in shortened("x" * 5000)


# ---- the page --------------------------------------------------------------------------------------------------------


def write_run(folder: Path, updates: int, rows: int, completion: str) -> Path:
    """A run's folder with `rows` trajectories an update, and a prompt that would break out of the page."""
    rng = np.random.default_rng(0)
    table: dict[str, list] = {}
    for step in range(1, updates + 1):
        rewards = (rng.random(rows) < step / updates).astype(float)
        values = rng.random(rows)
        tokens = [([7, int(prompt)], [step * rows + i]) for i, prompt in enumerate(rng.integers(0, 1000, rows))]
        ids, prompts = trajectory_ids(tokens)
        line = {
            "step": step, "beta": 0.1, "id": ids, "prompt": prompts, "origin": ["fresh"] * rows,
            "reward": rewards.tolist(), "residual": (values - rewards).tolist(), "soft_value": values.tolist(),
            "length": [1] * rows, "age": [0] * rows,
        }  # fmt: skip
        append_line(folder / "updates/process-0.jsonl", line)
        metrics = {"reward": rewards.mean(), "residual/mean": 0.1, "kl": 0.1, "entropy": 1.0, "step_time": 2.0}
        advised = {"advice": ["Consider a <b>larger</b> beta."]} if step == 1 else {}
        append_line(folder / "log.jsonl", {"step": step, **metrics, "eval_<b>set</b>_reward": 0.5, **advised})
        columns = {
            "prompt": [f"{NASTY} {one}" for one in prompts], "completion": [f"{completion}{i}" for i in range(rows)],
            "prompt_ids": [one for one, _ in tokens], "completion_ids": [one for _, one in tokens],
            "reward": rewards.tolist(), "end": ["eos"] * rows, "policy_step": [step - 1] * rows,
        }  # fmt: skip
        for name, values in columns.items():
            table.setdefault(name, []).extend(values)
    (folder / "rollouts").mkdir()
    pq.write_table(pa.table(table), folder / "rollouts/step-00000000-process-0.parquet")
    return folder


def test_the_page_is_one_file_and_shows_texts_as_texts(tmp_path):
    page = write_report([write_run(tmp_path / "<i>run", 4, 8, NASTY)]).read_text()
    assert page.count("</script>") == page.count("<script") == 3 and page.count("<!--") == 0
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page) and "default-src 'none'" in page
    data = data_of(page)
    (run,) = data["runs"]
    assert run["name"] == "<i>run" and run["updates"] == 4 and run["rollouts"] == 32
    assert len(run["completions"]) == 32
    first = run["completions"][0]
    assert first["completion"][:-1] == NASTY and first["prompt"].startswith(NASTY)
    assert first["residual"] == pytest.approx(first["soft_value"] - first["reward"], abs=1e-3)
    assert any("eval_<b>set</b>_reward" in chart["lines"] for chart in run["charts"])
    assert ".innerHTML" not in page.split("/script>")[-2]  # the page's own program


def test_two_runs_have_names_that_differ(tmp_path):
    runs = [write_run(tmp_path / name / "out", 2, 2, "x") for name in ("a", "b")]
    page = write_report(runs, tmp_path / "both.html").read_text()
    assert [run["name"] for run in data_of(page)["runs"]] == ["a/out", "b/out"]
    assert [run["name"] for run in data_of(html([read_run(runs[0])] * 2))["runs"]] == ["out (1)", "out (2)"]


def test_settings_that_hold_settings_are_shown_one_by_one():
    settings = {
        "beta": 0.1, "lr_scheduler_kwargs": {"min_lr": 1e-6}, "generation_kwargs": {},
        "reward functions": {"accuracy": "4f1a"}, "versions": {"torch": "2.9"},
    }  # fmt: skip
    (run,) = data_of(html([RunFolder("r", [], NONE, settings=settings)]))["runs"]
    assert list(run["settings"].items()) == [
        ("beta", "0.1"), ("generation_kwargs", "{}"), ("lr_scheduler_kwargs/min_lr", "1e-06"),
        ("reward functions/accuracy", "4f1a"), ("versions/torch", "2.9"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def long_report(tmp_path_factory) -> Path:
    """A hundred thousand trajectories with completions of 2,000 characters."""
    return write_report([write_run(tmp_path_factory.mktemp("long"), 1000, 100, "x" * 2000)])


def test_a_long_run_fits_on_a_page(long_report):
    """200 MB of text, a page of less than 5 MB, and every part of the run on it."""
    file = long_report
    assert file.stat().st_size < 5e6
    (run,) = data_of(file.read_text())["runs"]
    assert run["trajectories"] == run["rollouts"] == 100_000
    shown = run["completions"]
    assert 500 < len(shown) <= 1000 and {one["reward"] for one in shown} == {0.0, 1.0}
    parts = np.histogram([one["update"] for one in shown], bins=10, range=(0, 1000))[0]
    assert parts.min() > 0.9 * parts.mean()


def test_a_rollout_that_was_in_no_update_has_no_residual(tmp_path):
    folder = write_run(tmp_path, 1, 2, "x")
    rows = completions_of(read_run(folder).rollouts, NONE, 10**6)
    assert [(row["residual"], row["origin"]) for row in rows] == [(None, None)] * 2


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: `make browser` installs it")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """Opens a page from disk. It must print nothing to its console and request nothing from a network."""
    complaints: list[str] = []

    def open_page(file: Path, **options):
        page = chromium.new_context(**options).new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or complaints.append(request.url))
        page.goto(file.resolve().as_uri())
        page.wait_for_selector("#charts canvas")
        return page

    yield open_page
    assert not complaints


def pixels(page) -> list[str]:
    """What the charts show: a digest of each canvas."""
    return page.evaluate("[...document.querySelectorAll('canvas')].map(c => c.toDataURL())")


def test_in_a_browser_controls_work(opened, tmp_path):
    page = opened(write_report([write_run(tmp_path / "<i>run", 30, 8, NASTY)]))
    assert page.title() == "<i>run" and page.locator("h1").inner_text() == "<i>run"
    assert page.locator("main img, main script").count() == 0
    assert page.locator("#advice li").all_inner_texts() == ["Consider a <b>larger</b> beta."]
    charts, texts = pixels(page), page.locator("article")
    assert len(charts) == 9 and texts.count() == 40
    assert page.locator("article pre").nth(1).evaluate("e => e.textContent").startswith(NASTY)

    page.locator("#smoothing").fill("0.8")
    assert pixels(page)[0] != charts[0]
    page.locator("#period").fill("0")
    assert page.locator("#period-value").inner_text() == "updates 1 to 3"
    assert pixels(page)[-1] != charts[-1]
    page.locator("#theme").select_option("dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"

    page.locator("#more").click()
    assert texts.count() == 80
    page.locator("#from").fill("30")
    assert page.locator("#found").inner_text() == "8 found." and texts.count() == 8
    page.locator("#low").fill("0.5")
    assert {one.split()[-1] for one in page.locator("article header span:nth-child(2)").all_inner_texts()} == {"1"}
    page.locator("#text").fill("no such text")
    assert page.locator("#found").inner_text() == "0 found." and texts.count() == 0


def test_in_a_browser_two_runs_are_laid_over_each_other_on_a_phone(opened, tmp_path):
    runs = [write_run(tmp_path / name, updates, 8, "x") for name, updates in (("one", 20), ("two", 40))]
    page = opened(
        write_report(runs, tmp_path / "both.html"), viewport={"width": 390, "height": 844}, color_scheme="dark"
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#advice h3").all_inner_texts() == ["one", "two"]
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"
    labels = page.locator("[data-title=Reward] .u-label")
    assert labels.all_inner_texts() == ["update", "one reward", "two reward"]
    said = page.locator("#calibration-text").inner_text()
    assert "one, updates 20 to 20: " in said and "two, updates 38 to 40: " in said
    assert page.locator("#period-value").inner_text() == ""  # there is none for both
    page.locator("#runs input").nth(0).uncheck()
    assert page.locator("#period-value").inner_text() == "updates 38 to 40"
    assert labels.all_inner_texts() == ["update", "two reward"]


def test_in_a_browser_each_run_says_what_is_its_own(opened, tmp_path):
    """Differing settings are marked. With 2,500 log entries a point is three, and a note says so; with 10 it is one."""
    runs = [
        RunFolder(
            name, [{"step": step, "reward": 0.5} for step in range(1, entries + 1)], NONE,
            settings={"seed": 1, "lr_scheduler_kwargs": {"min_lr": rate, "num_cycles": 1}},
        )
        for name, entries, rate in (("short", 10, 0.1), ("long", 2500, 0.2))
    ]  # fmt: skip
    for name, some in (("both", runs), ("one", runs[1:])):
        (tmp_path / f"{name}.html").write_text(html(some))
    both, one = (opened(tmp_path / f"{name}.html") for name in ("both", "one"))
    assert both.locator(".card p").all_inner_texts() == [
        "Mean reward of rollouts. Each point of long is a mean of 3 log entries."
    ]
    assert one.locator(".card p").all_inner_texts() == [
        "Mean reward of rollouts. Each point is a mean of 3 log entries."
    ]
    differing = both.locator("#settings .differs td").all_text_contents()
    assert differing == ["lr_scheduler_kwargs/min_lr", "0.1", "0.2"]


def test_in_a_browser_a_long_run_opens_at_once(opened, long_report):
    """Within a second on a quiet machine. Other tests share this one, so it may take two."""
    before = time.perf_counter()
    opened(long_report)
    assert time.perf_counter() - before < 2
