"""Start processes, one or several with a launch file of the examples, also on CPUs.

python -m common.launch MODULE:FUNCTION ARGUMENTS FOLDER    # what `launch` runs in each process, under a launcher
"""

import gc
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

ROOT = Path(__file__).resolve().parents[2]
LAUNCH_FILES = ROOT / "examples/accelerate"
SEARCHED = os.pathsep.join(str(ROOT / folder) for folder in ("tests", "benchmarks"))  # for the functions to be launched
PROCESSES = multiprocessing.get_context("forkserver")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launcher_of(file: str, processes: int = 2) -> list[str]:
    """The command for a launch file of the examples, with the options that CPUs need."""
    config = LAUNCH_FILES / f"{file}.yaml"
    arguments = ["accelerate.commands.launch", "--config_file", str(config), "--mixed_precision", "no"]
    return [*arguments, "--num_processes", str(processes), "--main_process_port", str(free_port())]


def allow_fsdp_on_cpu() -> None:
    """Make accelerate keep FSDP on a CPU. It would use DDP instead, although torch can run FSDP there."""
    init = AcceleratorState.__init__

    def init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init_with_fsdp


def import_once(module: str) -> None:
    """Fork the processes of `PROCESSES` from one that has imported a module. Does nothing if that one is running."""
    searched = os.pathsep.join(filter(None, [SEARCHED, os.environ.get("PYTHONPATH")]))
    with mock.patch.dict(os.environ, PYTHONPATH=searched):
        PROCESSES.set_forkserver_preload([module])
        forkserver.ensure_running()


def become(log: str | Path, process: int = 0, processes: int = 1, port: int = 0) -> None:
    """Make a forked process print into a file, and set the variables of its process group."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if processes > 1:
        os.environ |= {
            "RANK": str(process), "LOCAL_RANK": str(process), "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    gc.freeze()  # the Trainer collects garbage when it starts, and can skip what was imported


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in a nested one with its path, in a form that is equal only if all bits are."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from flat(inner, f"{path}/{name}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from flat(inner, f"{path}/{index}")
    elif isinstance(value, (torch.Tensor, np.ndarray)):
        yield path, (value.dtype, value.shape, np.asarray(value).tobytes())
    else:
        yield path, repr(value)


def variables() -> dict[str, str]:
    """The environment of a process that a launcher starts: this interpreter's programs first, such as ninja."""
    paths = {name: os.pathsep.join(filter(None, [first, os.environ.get(name)]))
             for name, first in (("PATH", str(Path(sys.executable).parent)), ("PYTHONPATH", SEARCHED))}  # fmt: skip
    environment = {**os.environ, **paths}
    environment.pop("ACCELERATE_USE_CPU", None)  # left by a trainer in this process, it would mean "no DeepSpeed"
    return environment


def run(command: Sequence[str | Path], timeout: float = 600, **environment: str) -> str:
    """Run a command in the repository's root. It must succeed in time. Returns its output."""
    environment = variables() | environment
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group, to end it as a whole
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout)  # DeepSpeed compiles an operator on its first launch
        finally:
            with suppress(ProcessLookupError):  # it has ended already
                os.killpg(process.pid, signal.SIGTERM)  # on which torchrun ends its processes too
        code = process.wait(timeout=60)
        output.seek(0)
        printed = output.read()
    assert code == 0, f"Exit code {code}: {printed[-8000:]}"
    return printed


def launchers(under: str | Sequence[str] | None, processes: int = 2) -> list[list[str]]:
    """The module of each node's launcher and its options, for what `launch` takes; empty without a launcher."""
    if under is None:
        return [["torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]]
    if not isinstance(under, str):
        return [list(under)]
    nodes = yaml.safe_load((LAUNCH_FILES / f"{under}.yaml").read_text()).get("num_machines", 1)
    number = [["--main_process_ip", "127.0.0.1", "--machine_rank", str(node)] for node in range(nodes)]
    launcher = launcher_of(under, processes)
    return [launcher + number[node] * (nodes > 1) for node in range(nodes)]


def launch(
    function: str,
    under: str | Sequence[str] | None = None,
    processes: int = 2,
    environment: dict[str, str] | None = None,
    timeout: float = 600,
    **arguments: Any,
) -> list[Any]:
    """Call a function in each of several processes, and return its results in the order of their ranks.

    Args:
        function: `module:name`, of a module of the benchmarks or the tests.
        under: the name of a launch file of the examples, or another launcher with its options; an empty sequence for
            one process without a launcher. By default torchrun.
        processes: number of processes, unless `under` is a launcher with its options.
        environment: variables of the processes, besides this one's.
        timeout: seconds that they may take.
        arguments: arguments of the function, passed as JSON.
    """
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        called = ["-m", "common.launch", function, json.dumps(arguments, default=str), folder]
        modules = [["-m", *launcher] if launcher else [] for launcher in launchers(under, processes)]
        commands = [[sys.executable, *module, *called] for module in modules]
        list(pool.map(lambda command: run(command, timeout, **environment or {}), commands))
        returned = sorted(Path(folder).iterdir(), key=lambda file: int(file.stem))
        return [torch.load(file, weights_only=False) for file in returned]


def main(function: str, arguments: str, folder: str) -> None:
    module, name = function.split(":")
    result = getattr(import_module(module), name)(**json.loads(arguments))
    torch.save(result, Path(folder) / f"{os.environ.get('RANK', '0')}.pt")
    end_process()


def end_process() -> NoReturn:
    """End a process of a group, without the interpreter's shutdown.

    FSDP2's modules hold the process group, so gloo's threads may still run when the interpreter releases it. The
    process then aborts, about once in twenty runs (torch 2.13).
    """
    PartialState().destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
