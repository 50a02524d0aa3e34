"""The memory of a run, estimated before anything is loaded: `tbrm estimate`."""

from .estimate import MemoryEstimate, estimate_memory

__all__ = ["MemoryEstimate", "estimate_memory"]
