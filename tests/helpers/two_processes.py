"""One optimizer step on scripted rows, on two processes under torchrun."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from common.tiny import perturb, save

from helpers.forked import launch
from helpers.scripted import Row, script, scripted_trainer


def step_of_rows(folder: str, rows: list[dict], out: str, **options: Any) -> dict[str, Any]:
    """Make the step in this process. Returns what both processes saw."""
    trainer = scripted_trainer(folder, [Row(**row) for row in rows], out, **options)
    assert trainer.accelerator.num_processes == 2
    perturb(trainer.accelerator.unwrap_model(trainer.ref_model))
    trainer.train()
    return {
        "losses": gather_object([trainer.losses]),
        "windows": gather_object([trainer.windows[0]]),
        "gradients": trainer.recorder.gradients[0],
        "log": trainer.state.log_history,
    }


def in_each_of(processes: int, function: Callable[..., Any], **arguments: Any) -> list[Any]:
    """What a module's function returns in each process: in this one alone, or in several that are launched."""
    if processes == 1:
        return [function(**arguments)]
    return launch(f"{function.__module__}:{function.__name__}", processes=processes, **arguments)


def on_two_processes(folder: str, rows: list[Row], tmp_path: Path, under: str | None = None, **options: Any) -> dict:
    """What the first of two processes saw of a step on these rows."""
    function, rows = "helpers.two_processes:step_of_rows", [asdict(row) for row in rows]
    return launch(function, under, folder=folder, rows=rows, out=tmp_path, **options)[0]


def one_sided(tmp_path: Path, **options: Any) -> tuple[str, list[Row], dict[str, Any]]:
    """A step on rows of which only 0, 2 and 3 count, all on the first process: model, rows, and what was seen."""
    folder, rows = save(tmp_path / "model"), script(unscored=(1, 4, 5, 6, 7))
    seen = on_two_processes(folder, rows, tmp_path, **options)
    on_first, on_second = seen["windows"]
    assert len(on_first) == len(on_second) == 4
    assert all(t.reward != t.reward for t in on_second) and sum(t.reward == t.reward for t in on_first) == 3
    return folder, rows, seen
