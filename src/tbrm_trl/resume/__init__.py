"""Resume a killed run so that it ends where it would have ended without the kill."""

from .checkpoint import complete_checkpoints
from .exact_resume import ExactResume, RunState

__all__ = ["ExactResume", "RunState", "complete_checkpoints"]
