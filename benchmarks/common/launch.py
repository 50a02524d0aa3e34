"""Start processes, also several at once with a launch file of the examples, on CPUs too.

python -m common.launch MODULE:FUNCTION ARGUMENTS FILE    # what `call` runs in each process
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

BENCHMARKS = Path(__file__).resolve().parents[1]
LAUNCH_FILES = BENCHMARKS.parent / "examples/accelerate"


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


def call(function: str, launcher: Sequence[str] = (), threads: int = 1, **arguments: Any) -> Any:
    """What a function returns in a process of its own. Under a launcher, what it returns in the first process.

    Args:
        function: `module:name`.
        launcher: a module that starts processes, with its options. Without it, there is one process.
        threads: of each process.
        arguments: of the function. They and the result must be JSON.
    """
    paths = filter(None, [str(BENCHMARKS), os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [
            sys.executable,
            "-m",
            *launcher,
            *(["-m"] if launcher else []),
            "common.launch",
            function,
            json.dumps(arguments),
            str(output),
        ]
        subprocess.run(command, check=True, stdout=sys.stderr, env=environment)
        return json.loads(output.read_text())


def main(function: str, arguments: str, output: str) -> None:
    module, name = function.split(":")
    result = getattr(import_module(module), name)(**json.loads(arguments))
    if os.environ.get("RANK", "0") == "0":
        Path(output).write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
