"""Measuring: the exact peak of tensor memory on a CPU or a CUDA device, and training without output."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import transformers
from torch.autograd.profiler import profile

# Options of every measured trainer.
QUIET: dict[str, Any] = dict(
    gradient_checkpointing=False, save_strategy="no", report_to="none", logging_strategy="no", disable_tqdm=True
)


@contextmanager
def quiet() -> Iterator[None]:
    """No output on stdout, no warnings."""
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def set_up(threads: int = 1) -> None:
    """Use this many threads, and let transformers log only errors."""
    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@dataclass
class Peak:
    """Bytes above what was allocated on entry; set on exit."""

    bytes: int = 0


@contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[Peak]:
    """Measure the block's peak of allocated tensor bytes, relative to its start.

    On a CPU the profiler records every allocation, also inside kernels, and they are summed in their order. Memory from
    before that the block frees is not subtracted. The operating system's peak of resident memory would also count the
    allocator's leftovers. Recording slows the block down, so time it elsewhere.
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
    in_order = sorted(allocations, key=lambda event: event.start_ns())
    peak.bytes = max(accumulate((event.nbytes() for event in in_order), initial=0))  # negative where memory is freed
