"""Evaluate a language model on problems with a verifier: benchmarks, statistics and stored results."""

from .accuracy import Accuracy, evaluate_accuracy
from .statistics import Comparison, accuracy_from_scores, compare, majority, pass_at_k

__all__ = [
    "Accuracy",
    "Comparison",
    "accuracy_from_scores",
    "compare",
    "evaluate_accuracy",
    "majority",
    "pass_at_k",
]
