"""The one way in which tests start processes.

python -m helpers.launch MODULE:FUNCTION ARGUMENTS FOLDER    # in each process, under a launcher: what `launch` runs
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from accelerate import PartialState
from common.launch import LAUNCH_FILES, free_port, launcher_of

ROOT = Path(__file__).resolve().parents[2]
SEARCHED = os.pathsep.join(str(ROOT / folder) for folder in ("tests", "benchmarks"))


def run(command: Sequence[str | Path], **environment: str) -> str:
    """Run a command in the repository's root, which must succeed within ten minutes. Returns what it printed."""
    paths = {name: os.pathsep.join(filter(None, [first, os.environ.get(name)]))
             for name, first in (("PATH", str(Path(sys.executable).parent)), ("PYTHONPATH", SEARCHED))}  # fmt: skip
    environment = {**os.environ, **paths, **environment}
    environment.pop("ACCELERATE_USE_CPU", None)  # left by a trainer in this process, it would mean "no DeepSpeed"
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group to be ended as one
        )
        try:
            process.wait(timeout=600)  # DeepSpeed compiles an operator on its first launch
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):  # it is over
                os.killpg(process.pid, signal.SIGTERM)  # on which torchrun ends its processes too
        code = process.wait(timeout=60)
        output.seek(0)
        printed = output.read()
    assert code == 0, f"Exit code {code}: {printed[-8000:]}"
    return printed


def launch(
    function: str,
    under: str | list[str] | None = None,
    processes: int = 2,
    environment: dict[str, str] | None = None,
    **arguments: Any,
) -> list[Any]:
    """What a function returns in each of several processes, in the order of their ranks.

    Args:
        function: `module:name`, of a test module or a helper.
        under: a launch file of the examples, by its name, or another launcher with its options. Without it, torchrun.
        processes: how many, unless `under` is a launcher with its options.
        environment: variables of the processes, besides this one's.
        arguments: of the function, as JSON.
    """
    if isinstance(under, str):
        nodes = yaml.safe_load((LAUNCH_FILES / f"{under}.yaml").read_text()).get("num_machines", 1)
        number = [["--main_process_ip", "127.0.0.1", "--machine_rank", str(node)] for node in range(nodes)]
        launcher = launcher_of(under, processes)
        launchers = [launcher + number[node] * (nodes > 1) for node in range(nodes)]
    else:
        torchrun = ["torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
        launchers = [under or torchrun]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        called = ["--module", "helpers.launch", function, json.dumps(arguments, default=str), folder]
        list(pool.map(lambda one: run([sys.executable, "-m", *one, *called], **environment or {}), launchers))
        returned = sorted(Path(folder).iterdir(), key=lambda file: int(file.stem))
        return [torch.load(file, weights_only=False) for file in returned]


def main(function: str, arguments: str, folder: str) -> None:
    module, name = function.split(":")
    result = getattr(import_module(module), name)(**json.loads(arguments))
    torch.save(result, Path(folder) / f"{os.environ.get('RANK', '0')}.pt")
    end_process()


def end_process() -> NoReturn:
    """End a process of a group, without the interpreter's own end.

    FSDP2's modules hold the process group, so that gloo's threads may still run when the interpreter lets it go. The
    process then aborts, about once in twenty runs (torch 2.13).
    """
    PartialState().destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
