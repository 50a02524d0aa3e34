"""`common.launch.launch`, and scripts, in less time: processes are forked from one that has imported everything.

Importing torch, transformers and TRL takes a new interpreter longer than most tests compute. A launcher only sets
variables and starts processes, so it is asked for the variables. `test_examples` starts the launch files by command.
"""

import json
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest import mock

import peft  # noqa: F401 (for the processes)
import torch
import torch.distributed.run
from accelerate.commands.launch import launch_command, launch_command_parser
from common.launch import PROCESSES, ROOT, become, import_once, launchers, main, variables

import tbrm_trl.trainer  # noqa: F401 (for the processes)


def variables_of(launcher: Sequence[str]) -> list[dict[str, str]]:
    """The environment that a launcher gives to each process which it would start by torchrun."""
    asked: list[tuple[Any, dict[str, str]]] = []
    module, *options = launcher
    with (
        mock.patch.dict(os.environ, variables(), clear=True),
        mock.patch("torch.distributed.run.run", lambda given: asked.append((given, {**os.environ}))),
    ):
        if module == "torch.distributed.run":
            torch.distributed.run.main([*options, "script"])
        else:
            launch_command(launch_command_parser().parse_args([*options, "script"]))
    (((given, environment)),) = asked
    processes = int(given.nproc_per_node)
    return [
        environment
        | dict(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(given.master_port),
        )
        for rank in range(processes)
    ]  # fmt: skip


def enter(environment: Mapping[str, str], log: str) -> None:
    """Make a forked process one with this environment, in the repository's root, that prints into a file."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    become(log)


def call(environment: Mapping[str, str], log: str, function: str, arguments: str, folder: str) -> None:
    enter(environment, log)
    main(function, arguments, folder)


def execute(environment: Mapping[str, str], log: str, file: str, words: list[str]) -> None:
    enter(environment, log)
    sys.argv = [file, *words]
    sys.path[0] = str(Path(file).parent)
    runpy.run_path(file, run_name="__main__")


def run(processes: Sequence[Any], logs: str, timeout: float) -> None:
    """Run processes to their end. If one fails, or the time is over, the others are killed, and it raises."""
    running, deadline = list(processes), time.monotonic() + timeout
    for process in processes:
        process.start()
    while running and not any(process.exitcode for process in processes) and time.monotonic() < deadline:
        wait([process.sentinel for process in running], timeout=1)
        running = [process for process in processes if process.exitcode is None]
    for process in running:
        process.kill()
        process.join()
    codes = [process.exitcode for process in processes]
    assert not any(codes), f"Exit codes {codes}: " + "\n".join(
        f"process {file.name}: {file.read_text()[-4000:]}" for file in sorted(Path(logs).iterdir())
    )


def launch(
    function: str, under: str | Sequence[str] | None = None, processes: int = 2, timeout: float = 600, **arguments: Any
) -> list[Any]:
    """As `common.launch.launch`, on one node. If a process fails, the others are ended."""
    import_once("helpers.forked")
    with tempfile.TemporaryDirectory() as logs, tempfile.TemporaryDirectory() as folder:
        (launcher,) = launchers(under, processes)
        given = (function, json.dumps(arguments, default=str), folder)
        started = [
            PROCESSES.Process(target=call, args=(environment, f"{logs}/{rank}", *given))
            for rank, environment in enumerate(variables_of(launcher))
        ]
        run(started, logs, timeout)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(len(started))]


def run_script(file: Path, *words: str | Path, timeout: float = 600) -> str:
    """Run a Python script, which must succeed, as the main program of a process. Returns what it prints."""
    import_once("helpers.forked")
    with tempfile.TemporaryDirectory() as logs:
        given = (variables(), f"{logs}/0", str(file), list(map(str, words)))
        run([PROCESSES.Process(target=execute, args=given)], logs, timeout)
        return Path(f"{logs}/0").read_text()
