"""The most memory that tensors take at once, counted exactly on a CPU and on a CUDA device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.autograd.profiler import profile


@dataclass
class Peak:
    """Bytes above what was allocated on entry; set on exit."""

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[Peak]:
    """Measure the block's peak of allocated tensor bytes, relative to its start.

    On a CPU every allocation of torch's allocator is recorded (those inside a kernel too) and summed up in the order in
    which they were made; memory from before the block that it frees is not subtracted. The operating system's peak of
    resident memory would count the allocator's leftovers as well. It slows the block down, so time it elsewhere.
    """
    device, peak = torch.device(device), Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    # `torch.profiler.profile` would make a Python object of each event at its end, which takes longer than the block.
    with profile(use_kineto=True, profile_memory=True) as recorded:
        yield peak
    assert recorded.kineto_results is not None, "the profiler has stopped"
    allocations = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    live = 0
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        live += event.nbytes()  # negative where memory is freed
        peak.bytes = max(peak.bytes, live)
