"""What a benchmark reports: the machine, statistics, Markdown tables, plots, and the files it writes."""

import argparse
import importlib.metadata
import json
import math
import platform
import statistics
import tempfile
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs/benchmarks"
plt.switch_backend("Agg")
plt.rcParams.update(
    {"axes.grid": True, "grid.alpha": 0.3, "legend.fontsize": 8, "figure.constrained_layout.use": True,
     "savefig.dpi": 130}
)  # fmt: skip


# ---- the machine -----------------------------------------------------------------------------------------------------


def versions(*packages: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}


def listed(named: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in named.items())


def processor() -> str:
    """The processor's name, from Linux or else from Python."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# ---- options and files -----------------------------------------------------------------------------------------------


def parse(
    doc: str | None, quick: str = "", output: Path = DOCS, positional: dict[str, Any] | None = None, **options: Any
) -> argparse.Namespace:
    """Parse the arguments of a benchmark, and make the output folder if it is missing.

    Args:
        doc: what the benchmark does.
        quick: what its quick run (`--quick`) does, or "" if it has none.
        output: folder to write to, unless `--output` names another.
        positional: the positional arguments, each with the arguments of `add_argument`.
        options: the benchmark's own options, each with the arguments of `add_argument`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options |= {"output": dict(type=Path, help=f"folder (default: {output.relative_to(ROOT)})")}
    if quick:
        options |= {"quick": dict(action="store_true", help=f"{quick}, to a temporary folder")}
    for name, settings in {
        **(positional or {}),
        **{f"--{name}": settings for name, settings in options.items()},
    }.items():
        parser.add_argument(name, **settings)
    arguments = parser.parse_args()
    arguments.output = arguments.output or (Path(tempfile.mkdtemp()) if quick and arguments.quick else output)
    arguments.output.mkdir(parents=True, exist_ok=True)
    return arguments


def write(folder: Path, name: str, text: str, raw: Any = None, figure: Figure | None = None) -> None:
    """Write and print the page. Write the raw numbers, which may hold data classes, and the picture if given."""
    (folder / f"{name}.md").write_text(text)
    if raw is not None:
        (folder / f"{name}.json").write_text(json.dumps(raw, indent=1, default=vars) + "\n")
    if figure is not None:
        figure.savefig(folder / f"{name}.png")
        plt.close(figure)
    print(text, flush=True)


def area(accuracies: np.ndarray) -> float:
    """The mean along a curve of equidistant points, by the trapezoidal rule."""
    return float(np.trapezoid(accuracies) / (len(accuracies) - 1))


class Store(dict[str, Any]):
    """Results by the name of their run. Each new result rewrites the JSON file, which has one line per run."""

    def __init__(self, path: Path, **head: Any) -> None:
        super().__init__(json.loads(path.read_text())["runs"] if path.exists() else {})
        self.path, self.head = path, head

    def __setitem__(self, name: str, result: Any) -> None:
        super().__setitem__(name, result)
        head = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in self.head.items())
        runs = ",\n".join(f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(self[key])}" for key in sorted(self))
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(f'{{{head}"runs": {{\n{runs}\n}}}}\n')
        unfinished.rename(self.path)


# Student's t, two-sided 95%, by number of values
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


# ---- what commands print ---------------------------------------------------------------------------------------------

_BARS = ("it/s", "s/it", "B/s", "%|", "WARNING", "completion/s", "examples/s", "ba/s", "Warning", "warn")


def printed(output: str) -> list[str]:
    """What a command printed, without progress bars, warnings and the metrics of each step."""
    lines = [line.rpartition("\r")[2].rstrip() for line in output.splitlines()]
    return [
        one for one in lines if one and not one.startswith(("{'", '{"', " ")) and not any(bar in one for bar in _BARS)
    ]


# ---- numbers and text ------------------------------------------------------------------------------------------------


def ratios(mine: Iterable[float], theirs: Iterable[float]) -> list[float]:
    """The ratio of each pair."""
    return [a / b for a, b in zip(mine, theirs, strict=True)]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, which is NaN for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def show(values: Sequence[float], sign: str = "") -> str:
    """The mean and its standard error, or "" without values. With `sign="+"` a positive mean has its sign too."""
    if not values:
        return ""
    mean, error = mean_and_error(values)
    return f"{mean:{sign}.3f}" if math.isnan(error) else f"{mean:{sign}.3f} ± {error:.3f}"


def interval(differences: Sequence[float]) -> str:
    """Mean of paired differences, with Student's 95% interval."""
    mean, error = mean_and_error(differences)
    if math.isnan(error):
        return f"{mean:+.3f}"
    half = T_95[len(differences)] * error
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def wrapped(text: str, **indents: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False, **indents)  # type: ignore[arg-type]


def bullets(texts: Iterable[str]) -> str:
    return "\n".join(wrapped(f"- {text}", subsequent_indent="  ") for text in texts)


def band(axes: Axes, x: Sequence[float], samples: Iterable[Sequence[float]], style: str = "-", **options: Any) -> None:
    """Draw a line through the means, in a band of one standard error."""
    means, errors = np.transpose([mean_and_error(values) for values in samples])
    axes.plot(x, means, style, marker="o", markersize=3, **options)
    axes.fill_between(x, means - errors, means + errors, color=options["color"], alpha=0.15, linewidth=0)
