"""The one way in which tests start processes: that of the benchmarks."""

from common.launch import ROOT, SEARCHED, end_process, launch, run

__all__ = ["ROOT", "SEARCHED", "end_process", "launch", "run"]
