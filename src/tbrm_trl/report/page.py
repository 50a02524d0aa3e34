"""Put data, style, program and uPlot into one HTML file."""

import argparse
import json
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..files import appearing
from ..resume.checkpoint import flattened
from .charts import calibration, charts_of
from .completions import completions_of
from .run import RunFolder, read_run

CHARACTERS = 2_000_000  # most characters of completions on the page, over all runs


def write_report(runs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the page of one run, or of two overlaid runs.

    Args:
        runs: output directories.
        output: the file to write. By default `report.html` in the first run's folder.

    Returns:
        The file.
    """
    folders = [Path(run) for run in runs]
    file = Path(output) if output is not None else folders[0] / "report.html"
    page = html([read_run(folder) for folder in folders])
    with appearing(file) as partial:
        partial.write_bytes(page.encode("utf-8", "replace"))
    return file


def html(runs: Sequence[RunFolder]) -> str:
    """The page as text."""
    names = _names(runs)
    data = {
        "version": version("tbrm-trl"),
        "runs": [_data(run, name, CHARACTERS // len(runs)) for run, name in zip(runs, names, strict=True)],
    }
    parts = {
        "style": _text("uplot/uPlot.min.css") + _text("page.css"),
        "library": _text("uplot/uPlot.iife.min.js"),
        "data": json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        "program": _text("page.js"),
    }
    page = _text("page.html")
    for name, text in parts.items():  # split before inserting, so that data is never searched for marks
        before, after = page.split(f"/*{name}*/")
        parts[name] = before + text
        page = after
    return "".join(parts.values()) + page


def _data(run: RunFolder, name: str, characters: int) -> dict[str, Any]:
    rollouts = run.rollouts
    return {
        "name": name,
        "updates": run.log[-1]["step"] if run.log else 0,
        "trajectories": len(run.updates),
        "rollouts": 0 if rollouts is None else len(rollouts),
        "skipped": run.skipped,
        "advice": [sentence for line in run.log for sentence in line.get("advice", ())],
        "settings": {name: str(value) for name, value in sorted(flattened(run.settings))},
        "charts": charts_of(run),
        "calibration": calibration(run.updates),
        "completions": [] if rollouts is None else completions_of(rollouts, run.updates, characters),
    }


def _names(runs: Sequence[RunFolder]) -> list[str]:
    """The shortest ends of the runs' paths that tell them apart. A folder given twice is numbered."""
    paths = [Path(run.name).resolve().parts for run in runs]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path[-1]} ({place})" for place, path in enumerate(paths, 1)]


def _text(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="tbrm report",
        description="Write a run, or two laid over each other, as one page of HTML that opens from disk.",
    )
    parser.add_argument("run", help="Output directory of a run. The run may be under way.")
    parser.add_argument("other", nargs="?", help="Output directory of another run, to compare it with.")
    parser.add_argument("--output", help="File to write. The default is report.html in the run's folder.")
    given = parser.parse_args(arguments)
    try:
        file = write_report([run for run in (given.run, given.other) if run], given.output)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    print(file)
