"""Runs of `helpers.resume` in processes of their own, forked from one that has only imported everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common.launch import PROCESSES, flat, free_port, import_once

from helpers.resume import child


def processes_of(case: str) -> int:
    return 2 if case.startswith("two") else 1


def start(folder: Path, case: str, model: str, kill: tuple | None = None, **options: Any) -> list[Any]:
    """Start the processes of a run, as many as the case has, with options of `helpers.resume.run`."""
    number, port = processes_of(case), free_port()
    killed = kill[2] if kill and len(kill) > 2 else 0
    processes = [
        PROCESSES.Process(
            target=child,
            kwargs=dict(
                log=str(folder / f"log-{process}"), case=case, model=model, output_dir=str(folder / "out"),
                kill=kill[:2] if kill and process == killed else None, process=process, processes=number, port=port,
                **options,
            ),
        )
        for process in range(number)
    ]  # fmt: skip
    import_once("helpers.resume")
    for process in processes:
        process.start()
    return processes


def train(folder: Path, case: str, model: str, kill: tuple | None = None, **options: Any) -> list[int]:
    """Make a run in as many processes as the case has, with options of `helpers.resume.run`. Returns the exit codes."""
    processes = start(folder, case, model, kill, **options)
    for process in processes:
        process.join(200)
        process.kill()  # if it waits for a process that has ended
        process.join()
    return [process.exitcode for process in processes]


def printed(folder: Path) -> str:
    return "\n".join(file.read_text()[-3000:] for file in folder.glob("log-*"))


def differing(folder: Path, other: Path) -> list[str]:
    """What differs between the outcomes of two runs."""
    names = []
    files = sorted(file.name for file in folder.glob("outcome-*.pt"))
    assert files and files == sorted(file.name for file in other.glob("outcome-*.pt"))
    for file in files:
        first, second = (dict(flat(torch.load(one / file, weights_only=False))) for one in (folder, other))
        names += [f"{file}{path}" for path in {**first, **second} if first.get(path) != second.get(path)]
    tables = [
        {str(file.relative_to(run)): file.read_bytes() for file in run.glob("out/*/*.parquet")}
        for run in (folder, other)
    ]
    return names + [name for name in {**tables[0], **tables[1]} if tables[0].get(name) != tables[1].get(name)]
