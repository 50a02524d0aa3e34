"""What the commands refuse before they load anything, and in whole sentences."""

import pytest

from tbrm_trl.cli import main
from tbrm_trl.evaluation.sampling import Sampling

MODEL = ("--model_name_or_path", "m")


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        (["--compare", "a"], ["--compare takes two results, not 1"]),
        (["--compare", "a", "b", "--benchmarks", "x"], ["--compare compares what was evaluated"]),
        ([], ["--model_name_or_path is missing", "--benchmarks is missing"]),
        ([*MODEL, "--suite", "paper"], ["there is no suite 'paper'. Names: tbrm-paper"]),
        ([*MODEL, "--suite", "tbrm-paper", "--samples", "2"], ["--suite sets samples and temperature"]),
        ([*MODEL, "--suite", "tbrm-paper", "--temperature", "0.5"], ["--suite sets samples and temperature"]),
        ([*MODEL, "--benchmarks", "math500", "--limit", "0"], ["--limit 0 must be at least 1"]),
    ],
)
def test_evaluations(words, problems, capsys):
    """Every problem at once, a line each."""
    with pytest.raises(SystemExit) as ended:
        main(["eval", *words])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tbrm eval: ")]
    assert ended.value.code == 2 and len(said) == len(problems)
    assert all(problem in line for problem, line in zip(problems, said, strict=True))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--difficulty", "min_terms"], "--difficulty takes KEY=VALUE with JSON values, not 'min_terms'"),
        (["--difficulty", "min_terms=two"], "--difficulty takes KEY=VALUE with JSON values"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--rollouts-per-step", "9", "--train-problems", "8"], "must be at most --train-problems, 8"),
    ],
)
def test_demos(words, problem, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["demo", *words])
    assert ended.value.code == 2 and problem in capsys.readouterr().err


def test_a_demo_with_fewer_problems_than_it_asks_for(tmp_path):
    """There are 9·9 sums of two digits and as many differences: no thousand."""
    with pytest.raises(SystemExit, match="Lower --train-problems or --eval-problems"):
        main(["demo", "--model", "m", "--train-problems", "1000", "--output", str(tmp_path)])


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out.strip().count(".") == 2


def test_ways_to_sample():
    """All problems of one setting at once."""
    for good in (dict(temperature=0.0), dict(top_p=1.0, top_k=0, max_new_tokens=1), dict(top_p=0.1, top_k=5)):
        Sampling(**good)
    with pytest.raises(ValueError) as refused:
        Sampling(temperature=-0.1, top_p=0.0, top_k=-1, max_new_tokens=0)
    named = [line.partition("=")[0] for line in str(refused.value).splitlines()]
    assert named == ["temperature", "top_p", "top_k", "max_new_tokens"]
    with pytest.raises(ValueError, match=r"top_p=1.5 must be in \(0, 1\]"):
        Sampling(top_p=1.5)
    with pytest.raises(ValueError, match="2 greedy samples of a prompt are all the same"):
        Sampling(temperature=0.0).require_distinct(2)
    Sampling(temperature=0.0).require_distinct(1)
    Sampling(temperature=0.5).require_distinct(2)
