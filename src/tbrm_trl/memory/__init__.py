"""The memory of a run, estimated before anything is loaded: `python -m tbrm_trl.memory`."""

from .estimate import MemoryEstimate, estimate_memory

__all__ = ["MemoryEstimate", "estimate_memory"]
