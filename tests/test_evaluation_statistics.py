"""Statistics of an evaluation, against enumeration, simulation and numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from tbrm_trl.evaluation.statistics import (
    accuracy_from_scores,
    compare,
    majority,
    pass_at_k,
    sign_flip_p_value,
)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 2), (4, 4), (6, 3)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, k):
    for right in range(n + 1):
        row = [1.0] * right + [0.0] * (n - right)
        subsets = list(itertools.combinations(row, k))
        assert pass_at_k([row], k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_is_a_mean_over_problems_and_takes_no_partial_credit():
    """1 of 4 right at k = 4 is 1, not the 0.68 of drawing with replacement; 0.9 is not right."""
    assert pass_at_k([[1, 0, 0, 0], [0.9, 0, 0, 0]], 4) == 0.5


def test_pass_at_k_refuses_fewer_samples():
    with pytest.raises(ValueError, match="n = 2 samples"):
        pass_at_k([[1, 0, 0], [1, 0]], 3)


def test_the_standard_error_is_the_spread_over_draws_of_problems():
    """Over 4,000 redraws of problems and samples, the mean standard error is the standard deviation of the means."""
    random = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(4000):
        difficulty = random.beta(0.5, 0.5, size=40)
        scores = (random.random((40, 4)) < difficulty[:, None]).astype(float)
        mean, error = accuracy_from_scores(scores.tolist())
        means.append(mean)
        errors.append(error**2)
    assert math.sqrt(np.mean(errors)) == pytest.approx(np.std(means), rel=0.03)


def test_majority_by_hand():
    """Two of three agree on the right one; a tie of right and wrong is half; None does not vote; no vote is 0."""
    answers = [["a", "a", "b"], ["a", "b", None], [None, None, "a"], [None] * 3]
    scores = [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0] * 3]
    assert majority(answers, scores) == (1 + 0.5 + 1 + 0) / 4


def flipped(differences) -> float:
    """The share of all sign choices that give a sum as far from 0, counted one by one."""
    observed = abs(sum(differences))
    every = itertools.product((1, -1), repeat=len(differences))
    far = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= observed for signs in every]
    return sum(far) / len(far)


@pytest.mark.parametrize("seed", range(3))
def test_the_sign_flip_test_counts_every_sign(seed):
    random = np.random.default_rng(seed)
    differences = [Fraction(int(c), 12) for c in random.integers(-6, 9, size=10)]
    assert sign_flip_p_value(differences) == pytest.approx(flipped(differences))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1, 1e-6, 12.5])
def test_fractional_scores_are_counted_too(seed, scale):
    """Scores are eighths in units of any size. Equal sums count as equal, as they do for the whole numbers."""
    random = np.random.default_rng(seed)
    first, second = random.integers(0, 9, size=(2, 10, 3))
    differences = [int(b.sum() - a.sum()) for a, b in zip(first, second, strict=True)]
    found = compare(*((one * scale / 8).tolist() for one in (first, second)))
    assert found.p_value == pytest.approx(flipped(differences))
    assert found.difference == pytest.approx(sum(differences) / 10 / 3 * scale / 8)


def test_tenths_are_exact():
    """0.1 + 0.2 − 0.3 is 0, so all signs are as far from 0. Two signs of eight are as far as 0.1 + 0.2 + 0.3."""
    assert compare([[0.0]] * 3, [[0.1], [0.2], [0.3]]).p_value == 2 / 8
    assert compare([[0.0], [0.0], [0.3]], [[0.1], [0.2], [0.0]]).p_value == 1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("parts", [3, 6, 7, 12])
def test_partial_credit_is_exact(seed, parts):
    """Thirds and sevenths are no decimals, but 2/6 and 1/3 are as far from 0."""
    random = np.random.default_rng(seed)
    first, second = random.integers(0, parts + 1, size=(2, 9))
    differences = [int(b - a) for a, b in zip(first, second, strict=True)]
    found = compare(*([[one / parts] for one in scores] for scores in (first.tolist(), second.tolist())))
    assert found.p_value == pytest.approx(flipped(differences))


def test_thirds_by_hand():
    """Of 1/3, 1/6, 1/6 and −1/3, a sum as far from 0 as 1/3: twelve of sixteen choices of signs."""
    assert compare([[0.0]] * 4, [[1 / 3], [1 / 6], [1 / 6], [-1 / 3]]).p_value == 12 / 16


@pytest.mark.parametrize("shift", [0.0005, 0.001, 0.0015])
def test_many_fractional_scores(shift):
    """1,000 problems of 32 fractional scores each: with this many signs the sum is normal with variance Σ d²."""
    random = np.random.default_rng(0)
    first = random.random((1000, 32))
    second = np.clip(first + random.normal(shift, 0.1, size=first.shape), 0, None)
    differences = second.mean(axis=1) - first.mean(axis=1)
    z = abs(differences.sum()) / math.sqrt((differences**2).sum())
    found = compare(first.tolist(), second.tolist())
    assert found.p_value == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02, abs=1e-4)
    assert found.difference == pytest.approx(differences.mean())


def test_few_scores_of_many_digits():
    """They have more steps than can be counted, so they are rounded, which here changes no order of sums."""
    random = np.random.default_rng(2)
    first, second = random.random((2, 9, 7))
    found = compare(first.tolist(), second.tolist())
    assert found.p_value == pytest.approx(flipped((second.mean(axis=1) - first.mean(axis=1)).tolist()))


@pytest.mark.parametrize("score", [math.inf, -math.inf, math.nan])
def test_scores_that_are_not_finite_are_refused(score):
    with pytest.raises(ValueError, match=f"Problem 1 has a score of {score}: only finite"):
        compare([[0.5], [0.5]], [[1.0], [0.0, score]])


def test_a_comparison_by_hand():
    """Means 0.5, 0, 1 become 1, 0, 0.5: differences ½, 0, −½, whose sum is 0, so every sign is at least as far."""
    result = compare([[1, 0], [0], [1]], [[1], [0, 0], [0, 1]])
    assert (result.difference, result.better, result.worse, result.p_value) == (0, 1, 1, 1)
    assert result.standard_error == pytest.approx(math.sqrt(0.25 / 3))
    five = compare([[0]] * 5, [[1]] * 5)
    assert five.difference == 1 and five.p_value == pytest.approx(2 / 2**5)


def test_equal_results_and_other_problems():
    same = compare([[0.25]] * 3, [[0.25]] * 3)
    assert (same.difference, same.p_value) == (0, 1)
    with pytest.raises(ValueError, match="3 here, 2 there"):
        compare([[1]] * 3, [[1]] * 2)


def test_under_equal_policies_p_values_are_not_too_small():
    """Of 400 comparisons of one policy with itself, about one in twenty is below 0.05; never many more."""
    random = np.random.default_rng(1)
    scores = (random.random((400, 2, 30, 4)) < random.beta(1, 1, size=(400, 1, 30, 1))).astype(float)
    small = sum(compare(a.tolist(), b.tolist()).p_value < 0.05 for a, b in scores)
    assert 5 <= small <= 32
