"""Statistics of an evaluation: means over problems, where each problem counts once however many samples it has."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

STEPS = 250_000  # most steps of a sign-flip test's differences together; a thousand problems then take about a second


def accuracy_from_scores(scores: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean over problems of each problem's mean score (avg@n), and the standard error of that mean over problems.

    Raises:
        ValueError: if there is no problem, or one without a sample.
    """
    if not scores or not all(scores):
        raise ValueError("Every problem needs at least one score, and there must be at least one problem.")
    return mean_and_error([sum(row) / len(row) for row in scores])


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error: standard deviation over √n. The error of a single value is NaN."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, math.sqrt(variance / n)


def pass_at_k(scores: Sequence[Sequence[float]], k: int) -> float:
    """The chance that at least one of k samples, drawn without replacement from a problem's n, is right.

    It is `1 − C(n−c, k) / C(n, k)` for c right samples of n, averaged over problems, and is unbiased. A sample is right
    if its score is at least 1.

    Raises:
        ValueError: if a problem has fewer than k samples.
    """
    fewest = min(map(len, scores))
    if not 1 <= k <= fewest:
        raise ValueError(f"pass@{k} needs 1 ≤ k ≤ n, but a problem has n = {fewest} samples. Draw more, or lower k.")
    return sum(_chance(len(row), sum(score >= 1 for score in row), k) for row in scores) / len(scores)


def _chance(n: int, right: int, k: int) -> float:
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(answers: Sequence[Sequence[Hashable]], scores: Sequence[Sequence[float]]) -> float:
    """The mean score of each problem's most frequent answer, averaged over problems (maj@n).

    An answer of None is no vote. If answers tie, the score is the mean of theirs, as if a fair coin chose. A problem
    without a vote scores 0.
    """
    return sum(map(_score_of_majority, answers, scores)) / len(scores)


def _score_of_majority(answers: Sequence[Hashable], scores: Sequence[float]) -> float:
    votes: dict[Hashable, list[float]] = defaultdict(list)
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            votes[answer].append(score)
    most = max(map(len, votes.values()), default=0)
    means = [sum(votes_of) / most for votes_of in votes.values() if len(votes_of) == most]
    return sum(means) / len(means) if means else 0.0


@dataclass(frozen=True)
class Comparison:
    """Comparison of two policies on the same problems.

    Attributes:
        difference: mean over problems of the second policy's mean score minus the first's.
        standard_error: standard error of that mean, over problems.
        p_value: two-sided p-value of the sign-flip test: the probability of at least as large a difference if a fair
            coin swapped each problem's two results.
        better, worse: the number of problems on which the second policy is better, or worse.
        problems: the number of problems.
    """

    difference: float
    standard_error: float
    p_value: float
    better: int
    worse: int
    problems: int

    def __str__(self) -> str:
        return (
            f"{self.difference:+.4f} ± {self.standard_error:.4f}, p = {self.p_value:.3g} (paired over "
            f"{self.problems} problems: {self.better} better, {self.worse} worse)"
        )


def compare(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Comparison:
    """Compare the scores of two policies. Row i of both is problem i; their numbers of samples may differ.

    Raises:
        ValueError: if the numbers of problems differ, a problem has no sample, or a score is NaN or infinite.
    """
    if len(first) != len(second) or not all(first) or not all(second):
        raise ValueError(f"Problems must be the same, with samples: {len(first)} here, {len(second)} there.")
    for problem, (before, after) in enumerate(zip(first, second, strict=True)):
        for score in (*before, *after):
            if not math.isfinite(score):
                raise ValueError(f"Problem {problem} has a score of {score}: only finite scores can be compared.")
    largest = max(abs(score) for rows in (first, second) for row in rows for score in row)
    exact = [_mean(after, largest) - _mean(before, largest) for before, after in zip(first, second, strict=True)]
    difference, error = mean_and_error([float(one) for one in exact])
    better, worse = sum(one > 0 for one in exact), sum(one < 0 for one in exact)
    return Comparison(difference, error, sign_flip_p_value(exact), better, worse, len(exact))


def _mean(scores: Sequence[float], largest: float) -> Fraction:
    """The mean as a fraction, of scores as fractions. Equal sums of such scores as 1/3 or 0.1 stay equal."""
    unit = Fraction(10) ** min(0, math.floor(math.log10(largest))) if largest else Fraction(1)
    return sum((_fraction(Fraction(score) / unit) for score in scores), Fraction()) * unit / len(scores)


def _fraction(score: Fraction) -> Fraction:
    """The fraction that a score of floating point stands for: a decimal of six digits, or of a small denominator.

    A score that is near neither is rounded to six digits. So the denominators of many scores have a small multiple in
    common.
    """
    decimal, simple = Fraction(round(score * 10**6), 10**6), score.limit_denominator(1000)
    return simple if abs(score - decimal) > Fraction(1, 10**9) and abs(score - simple) < Fraction(1, 10**7) else decimal


def sign_flip_p_value(differences: Sequence[Fraction]) -> float:
    """The probability of at least as large an absolute sum if every difference had a random sign.

    The distribution of the sum is built one difference at a time, in steps of the differences' greatest common divisor.
    It is exact unless the differences add up to more than `STEPS` steps. They are then rounded to that many steps.
    """
    unit = math.lcm(*(one.denominator for one in differences))
    steps = [int(one * unit) for one in differences if one]
    step = math.gcd(*steps) or 1
    steps = [one // step for one in steps]
    if (reach := sum(map(abs, steps))) > STEPS:
        steps = [round(one * STEPS / reach) for one in steps]
    chance = np.ones(1)  # probability of each sum of the positive differences: 0, 1, …
    for one in sorted(map(abs, steps)):
        chance = (np.pad(chance, (0, one)) + np.pad(chance, (one, 0))) / 2
    reach = len(chance) - 1
    sums = np.abs(2 * np.arange(reach + 1) - reach)  # positive minus negative differences
    return float(min(1.0, chance[sums >= abs(sum(steps))].sum()))
