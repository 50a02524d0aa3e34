"""Values in JSON, and rows of a file."""

import json
import math
import shutil
from collections import deque
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers.training_args import OptimizerNames

from tbrm_trl.files import plain, read_table, remove_folder, rows_of_file
from tbrm_trl.run_log import append_line, read_lines


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, None),
        (math.inf, "inf"),
        (np.float64("-inf"), "-inf"),
        (torch.tensor([1.5, math.nan]), [1.5, None]),
        (np.float32(0.5), 0.5),
        ((1, deque([True, "a"])), [1, [True, "a"]]),
        ({1: {"x": (math.nan,)}}, {"1": {"x": [None]}}),
        (OptimizerNames.SGD, "sgd"),
        (print, str(print)),
    ],
)
def test_plain_values(value, expected):
    """NaN is no value. An infinite number is one, which JSON has no number for."""
    assert plain(value) == expected
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == expected


def test_some_rows_of_a_table(tmp_path):
    """Wherever its row groups end."""
    pq.write_table(pa.table({"row": range(10), "other": range(10)}), tmp_path / "t.parquet", row_group_size=3)
    for first in range(11):
        for last in range(first, 11):
            read = read_table(tmp_path / "t.parquet", ["row"], range(first, last))
            assert read.to_pydict() == {"row": [*range(first, last)]}


def test_a_folder_that_a_kill_leaves_half_removed_has_another_name(tmp_path, monkeypatch):
    folder = tmp_path / "step-1"
    folder.mkdir()
    (folder / "a").write_text("a")

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_folder(folder)
    assert not folder.exists() and len(list(tmp_path.iterdir())) == 1
    remove_folder(tmp_path / "not there")
    assert not list(tmp_path.iterdir())


def test_the_log_has_six_digits_and_no_nan(tmp_path):
    append_line(tmp_path / "log.jsonl", {"step": 1, "loss": 1 / 3, "reward": math.nan, "grad_norm": math.inf})
    assert read_lines(tmp_path / "log.jsonl") == [{"step": 1, "loss": 0.333333, "reward": None, "grad_norm": "inf"}]


def test_a_full_disk_is_named_by_the_log():
    with pytest.raises(OSError, match=r"Cannot write to /dev/full: No space left on device\. .* choose another folder"):
        append_line(Path("/dev/full"), {"step": 1})


def test_rows_of_each_kind_of_file(tmp_path):
    expected = [{"question": "1+1=", "answer": 2}, {"question": "2+2=", "answer": 4}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, expected)))
    (tmp_path / "a.json").write_text(json.dumps(expected))
    (tmp_path / "words.csv").write_text('completion\nNone\nnull\nN/A\n""\n')
    assert rows_of_file(tmp_path / "words.csv")["completion"] == ["None", "null", "N/A", None]
    (tmp_path / "a.csv").write_text("question,answer\n1+1=,2\n2+2=,4\n")
    rows_of_file(tmp_path / "a.csv").to_parquet(tmp_path / "a.parquet")
    for kind in ("jsonl", "json", "csv", "parquet"):
        assert rows_of_file(tmp_path / f"a.{kind}").to_list() == expected


def test_a_files_name_is_no_pattern(tmp_path):
    for name in ("d1", "d[1]", "q?", "qa", "[x]"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"a": name}) + "\n")
        assert rows_of_file(tmp_path / f"{name}.jsonl")["a"] == [name]


def test_dates_in_json_stay_text(tmp_path):
    """pyarrow would read them as times, inside messages too."""
    rows = [
        {"day": f"2024-01-0{n}", "answer": n, "prompt": [{"role": "user", "content": f"2024-01-0{n}"}], "at": None}
        for n in (1, 2)
    ]
    rows[1]["at"] = "2024-01-05 10:00:00"
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for kind in ("jsonl", "json"):
        assert rows_of_file(tmp_path / f"a.{kind}").to_list() == rows
    (tmp_path / "columns.json").write_text(json.dumps({"day": ["2024-01-01"], "n": [1]}))
    assert rows_of_file(tmp_path / "columns.json").to_list() == [{"day": ["2024-01-01"], "n": [1]}]  # one row of lists


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "question,answer\nWhat is 2, 3 summed?,5\nWhat is 4, 5 summed?,9\n", "more fields than its first"),
        ("a.csv", "question,answer\n2,5,\n", "more fields than its first"),
        ("a.csv", "question,answer\n", "it has no rows"),
        ("a.json", "[]", "it has no rows"),
        ("a.jsonl", "\n", "it has no rows"),
        ("a.jsonl", "", "it is empty"),
    ],
)
def test_files_that_have_no_rows_or_shifted_ones(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        rows_of_file(tmp_path / name)
