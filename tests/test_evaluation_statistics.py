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
    """Problems and samples drawn anew 4,000 times: the mean standard error is the means' standard deviation."""
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


@pytest.mark.parametrize("seed", range(3))
def test_the_sign_flip_test_counts_every_sign(seed):
    random = np.random.default_rng(seed)
    differences = [Fraction(int(c), 12) for c in random.integers(-6, 9, size=10)]
    observed = abs(sum(differences))
    signed = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= observed
        for signs in itertools.product((1, -1), repeat=10)
    ]
    assert sign_flip_p_value(differences) == pytest.approx(sum(signed) / len(signed))


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
