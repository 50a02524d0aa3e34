"""Start several processes with a launch file of the examples, on CPUs too."""

from __future__ import annotations

import socket
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

LAUNCH_FILES = Path(__file__).resolve().parents[2] / "examples/accelerate"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launcher_of(file: str, processes: int = 2) -> list[str]:
    """A launch file of the examples, with what CPUs need."""
    config = LAUNCH_FILES / f"{file}.yaml"
    arguments = ["accelerate.commands.launch", "--config_file", str(config), "--mixed_precision", "no"]
    return [*arguments, "--num_processes", str(processes), "--main_process_port", str(free_port())]


def allow_fsdp_on_cpu() -> None:
    """Without an accelerator, accelerate makes DDP of FSDP; torch runs it there just as well."""
    init = AcceleratorState.__init__

    def init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init_with_fsdp
