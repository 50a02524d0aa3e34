"""The column of the answers is found by its content, and rows without an answer are named before training."""

import pytest
from datasets import Dataset

from tbrm_trl.rewards import find_column, read_golds

WORKED = (
    "Consider the smallest case first. " * 10 + "This proves that the number of pairs is as claimed, hence the result."
)
DATA_SETS = {
    "OlympiadBench": ({"question": "?", "solution": [WORKED], "final_answer": ["$\\frac{1}{2}$"]}, "final_answer"),
    "DAPO": ({"prompt": "?", "ability": "MATH", "reward_model": {"ground_truth": "34", "style": "rule"}},
             "reward_model.ground_truth"),
    "Minerva": ({"problem": "?", "type": "Physics", "solution": "So $L=\\boxed{3.2e31}$ erg/s."}, "solution"),
    "GSM8K": ({"question": "?", "answer": "3 * 4 = 12\n#### 12"}, "answer"),
    "MATH-500": ({"problem": "?", "solution": f"{WORKED} $\\boxed{{3}}$", "answer": "3", "level": 1}, "answer"),
    "AMC": ({"id": 1, "problem": "?", "answer": 27.0, "url": "https://x"}, "answer"),
    "log": ({"prompt": "1+1=", "completion": "2", "reward": 1.0}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA_SETS)
def test_column(name):
    row, column = DATA_SETS[name]
    rows = [row] * 3
    assert find_column(rows) == find_column(Dataset.from_list(rows)) == column
    if column is not None:
        golds = read_golds(rows)
        assert golds.column == column and not golds.unreadable and None not in golds.texts
        assert str(golds) == f"3 of 3 answers in the column {column!r} can be read."


@pytest.mark.parametrize(
    ("cells", "column"),
    [
        ({"reward_model.ground_truth": "4"}, "reward_model.ground_truth"),  # flattened
        ({"reward_model.ground_truth": "4", "reward_model": {"style": "rule"}}, "reward_model.ground_truth"),
        ({"verl.reward_model": {"ground_truth": "4"}}, "verl.reward_model.ground_truth"),  # a key in such a column
    ],
)
def test_a_column_with_a_dot_in_its_name(cells, column):
    rows = [{"prompt": "2+2?", **cells}] * 5
    for given in (rows, Dataset.from_list(rows)):
        assert find_column(given) == column
        for named in (None, column):
            golds = read_golds(given, named)
            assert golds.texts == ["4"] * 5
            assert str(golds) == f"5 of 5 answers in the column {column!r} can be read."
    with pytest.raises(ValueError, match=r"There is no column 'absent\.ground_truth'"):
        read_golds(rows, "absent.ground_truth")


def test_unreadable_rows():
    rows = [{"question": "?", "answer": one} for one in ("3", "", "\\frac{1}{", "x+1", None)]
    with pytest.raises(ValueError, match=r"2 of 5 answers .* Rows without: 1 \(''\), 2 .*, 4 \(None\)"):
        read_golds(rows)
    golds = read_golds(rows, unreadable="leave_out")
    assert golds.texts == ["3", None, None, "x+1", None] and list(golds.unreadable) == [1, 2, 4]
    with pytest.raises(ValueError, match="Columns: prompt, completion"):
        read_golds([DATA_SETS["log"][0]])
    with pytest.raises(ValueError, match="leave_out"):
        read_golds(rows, unreadable="drop")
