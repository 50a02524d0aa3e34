"""Runs that end, after a kill, where they would have ended without."""

from .checkpoint import complete_checkpoints
from .exact_resume import ExactResume, RunState

__all__ = ["ExactResume", "RunState", "complete_checkpoints"]
